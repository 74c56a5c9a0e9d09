"""Hugging Face models: layers of several kinds, checkpointed, quantized and with adapters."""

from typing import Any

import pytest
import torch
from torch import nn

import moonfx
from tests.support.agreement import BLOCK, FEW, ROUNDING, Tolerance, compiled, sparsified
from tests.support.surroundings import SPARSE, X, forward, outcome
from tests.support.tiny import TinyLM


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONFX_VERIFY", "1")


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "use_cache": False,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def hugging_face(family: str, form: str = "sdpa", config: str = "", **sizes: Any) -> nn.Module:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers, pinned in requirements.txt"
    )
    made = getattr(transformers, f"{config or family}Config")(**{**SMALL, **sizes})
    kind = getattr(transformers, f"{family}ForCausalLM")
    return kind._from_config(made, attn_implementation=form).eval()


def llama() -> nn.Module:
    return hugging_face("Llama")


WINDOW = "sliding window of 16 tokens"
KINDS = [
    # family, attention, sizes, what is said of the two layers
    ("Mixtral", "sdpa", {"num_local_experts": 4}, [SPARSE, SPARSE]),
    ("Qwen2Moe", "eager", {**EXPERTS, "num_experts": 4}, [SPARSE, SPARSE]),
    ("Gemma2", "eager", {**MIXED, "head_dim": 8}, [WINDOW, SPARSE]),
    ("Gemma3", "sdpa", {**MIXED, "head_dim": 8, "config": "Gemma3Text"}, [WINDOW, SPARSE]),
    ("GptOss", "eager", {**MIXED, "head_dim": 8, "num_local_experts": 4}, [WINDOW, SPARSE]),
    (
        "Qwen2",
        "sdpa",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        [SPARSE, WINDOW],
    ),
    (
        "Llama4",
        "sdpa",
        {
            "config": "Llama4Text",
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 4,
        },
        ["chunked attention", SPARSE],
    ),
]


@pytest.mark.parametrize(
    ("family", "form", "sizes", "expected"), KINDS, ids=[row[0] for row in KINDS]
)
def test_experts_and_layers_of_several_kinds(family, form, sizes, expected) -> None:
    """A router's softmax is no attention; each layer is judged by its own mask."""
    report = compiled(hugging_face(family, form, **sizes), forward)
    assert [r.layer for r in report.rows] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for (_, found), wanted in zip(outcome(report), expected, strict=True):
        assert found == wanted if wanted == SPARSE else wanted in found


LLAMA = [(f"model.layers.{i}.self_attn", SPARSE) for i in range(2)]


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_hugging_face_models_in_training(form, reentrant) -> None:
    model = hugging_face("Llama", form).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert outcome(sparsified(model, forward)) == LLAMA


# --- other weights: quantized, and adapted --------------------------------------------------------

# A sum in another order may round an activation to the next of its 255 steps.
STEP = Tolerance(output=3e-2)
QUANTIZED = [("Int8WeightOnlyConfig", ROUNDING), ("Int8DynamicActivationInt8WeightConfig", STEP)]


@pytest.mark.parametrize("make", [TinyLM, llama], ids=["tiny", "llama"])
@pytest.mark.parametrize(("kind", "tolerance"), QUANTIZED, ids=[k for k, _ in QUANTIZED])
def test_attention_between_linears_of_torchao_is_sparse(make, kind, tolerance) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="needs torchao, pinned in requirements.txt"
    )
    model = make().eval().requires_grad_(False)
    quantization.quantize_(model, getattr(quantization, kind)())
    report = sparsified(model, forward, tolerance)
    assert [action for _, action in outcome(report)] == [SPARSE, SPARSE]
    assert report.failures == []


def adapted(model: nn.Module, name: str = "default") -> Any:
    peft = pytest.importorskip("peft", reason="needs peft, pinned in requirements.txt")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora, adapter_name=name)


def test_a_model_with_adapters_is_sparse_in_training_switched_and_merged() -> None:
    model = adapted(llama()).train()
    report = sparsified(model, forward)
    assert [action for _, action in outcome(report)] == [SPARSE, SPARSE]
    model.add_adapter("other", model.peft_config["default"])
    dense = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        with moonfx.full_attention(model):
            dense[name] = model(X).logits
        few = model(X).logits
        assert (few - dense[name]).abs().max() > 1e-4
    assert (dense["default"] - dense["other"]).abs().max() > 1e-4
    merged = moonfx.restore(model).merge_and_unload()
    assert outcome(sparsified(merged, forward)) == LLAMA


def test_a_sparse_model_that_adapters_are_put_on_stays_sparse_and_knows_its_report() -> None:
    model = moonfx.sparsify(llama(), BLOCK, FEW, compiler="eager", on_miss="raise")
    wrapper = adapted(model).eval()
    found = wrapper(X).logits
    assert outcome(moonfx.report(model)) == LLAMA
    with pytest.raises(ValueError, match="but base_model.model within it is: ask for its report"):
        moonfx.report(wrapper)
    moonfx.restore(model)
    assert (wrapper(X).logits - found).abs().max() > 1e-4
    moonfx.sparsify(wrapper, BLOCK, FEW, compiler="eager")
    torch.testing.assert_close(wrapper(X).logits, found, atol=5e-6, rtol=1e-4)
