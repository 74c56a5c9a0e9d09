"""The roles in models of transformers: how many of each, and where the matrices of each lie.

Each row: the family, the sizes that differ, and for one layer how many parameters have each role
and the layout of those that are not one plain matrix. All of them by the graph.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from moonfx.cli.tiny_config import Sizes, tiny
from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import RoleRow

transformers = pytest.importorskip(
    "transformers", reason="needs transformers, pinned in requirements.txt"
)

IDS = torch.arange(16)[None]
THREE = Layout(sizes=(64, 64, 64))
EXPERTS, FLAT = Layout("batch"), Layout("flatten")
RESNET = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}


def build(family: str, head: str, layers: int = 1, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    small = Sizes(layers=layers, most=layers)
    config = tiny(getattr(transformers, f"{family}Config")(**sizes), small)
    return getattr(transformers, f"{family}{head}")._from_config(config).eval()


def rows(model: nn.Module, example: Any) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {row.name: row for row in classify(parameters, names, model, example)}


MODELS = [
    # family, head, sizes, example; roles; the layouts of what is not one plain matrix
    (
        ("GPT2", "LMHeadModel", {}, (IDS,)),
        {
            "tied head": 1,
            "position embedding": 1,
            "norm gain": 3,
            "bias": 7,
            "fused projection": 1,
            "hidden matrix": 3,
        },
        {"transformer.h.0.attn.c_attn.weight": Layout("matrix", 1, 1, (64, 64, 64))},
    ),
    (
        ("Mixtral", "ForCausalLM", {}, (IDS,)),
        {
            "embedding": 1,
            "hidden matrix": 4,
            "router": 1,
            "experts": 2,
            "norm gain": 3,
            "head": 1,
        },
        {
            "model.layers.0.mlp.experts.gate_up_proj": Layout("batch", 0, 1, (96, 96)),
            "model.layers.0.mlp.experts.down_proj": EXPERTS,
        },
    ),
]
LONGER = [
    (
        ("GPTNeoX", "ForCausalLM", {}, (IDS,)),
        {
            "embedding": 1,
            "norm gain": 3,
            "bias": 7,
            "fused projection": 1,
            "hidden matrix": 3,
            "head": 1,
        },
        {"gpt_neox.layers.0.attention.query_key_value.weight": Layout("matrix", 0, 4, (16,) * 3)},
    ),
    (
        ("Phi3", "ForCausalLM", {}, (IDS,)),
        {"embedding": 1, "fused projection": 2, "hidden matrix": 2, "norm gain": 3, "head": 1},
        {
            "model.layers.0.self_attn.qkv_proj.weight": THREE,
            "model.layers.0.mlp.gate_up_proj.weight": Layout(sizes=(96, 96)),
        },
    ),
    (
        ("Falcon", "ForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, (IDS,)),
        {"tied head": 1, "fused projection": 1, "hidden matrix": 3, "norm gain": 3, "bias": 3},
        {
            "transformer.h.0.self_attention.query_key_value.weight": Layout(
                "matrix", 0, 2, (32, 16, 16)
            )
        },
    ),
    (
        ("Falcon", "ForCausalLM", {"multi_query": True}, (IDS,)),
        {"tied head": 1, "fused projection": 1, "hidden matrix": 3, "norm gain": 2, "bias": 2},
        {"transformer.h.0.self_attention.query_key_value.weight": Layout(sizes=(64, 16, 16))},
    ),
    (
        ("Qwen3Moe", "ForCausalLM", {}, (IDS,)),
        {
            "embedding": 1,
            "hidden matrix": 4,
            "router": 1,
            "experts": 2,
            "norm gain": 5,
            "head": 1,
        },
        {
            "model.layers.0.mlp.experts.gate_up_proj": Layout("batch", 0, 1, (32, 32)),
            "model.layers.0.mlp.experts.down_proj": EXPERTS,
        },
    ),
    (
        ("GptOss", "ForCausalLM", {}, (IDS,)),  # gate and up are every other column
        {
            "embedding": 1,
            "vector": 1,
            "hidden matrix": 4,
            "bias": 7,
            "router": 1,
            "experts": 2,
            "norm gain": 3,
            "head": 1,
        },
        {
            "model.layers.0.mlp.experts.gate_up_proj": Layout("batch", 1, 96, (1, 1)),
            "model.layers.0.mlp.experts.down_proj": EXPERTS,
        },
    ),
    (
        ("Mamba", "ForCausalLM", {}, (IDS,)),
        {
            "tied head": 1,
            "norm gain": 2,
            "scan parameter": 3,
            "depthwise convolution": 1,
            "bias": 1,
            "fused projection": 2,
            "hidden matrix": 2,
        },
        {
            "backbone.layers.0.mixer.in_proj.weight": Layout(sizes=(96, 96)),
            "backbone.layers.0.mixer.x_proj.weight": Layout(sizes=(8, 8, 8)),
        },
    ),
    (
        ("T5", "ForConditionalGeneration", {}, {"input_ids": IDS, "decoder_input_ids": IDS}),
        {"tied head": 1, "hidden matrix": 16, "position embedding": 2, "norm gain": 7},
        {},
    ),
    (
        ("Bert", "ForMaskedLM", {}, (IDS,)),
        {
            "tied head": 1,
            "position embedding": 1,
            "embedding": 1,
            "norm gain": 4,
            "bias": 12,
            "hidden matrix": 7,
        },
        {},
    ),
    (
        ("ViT", "ForImageClassification", {}, (torch.zeros(1, 3, 8, 8),)),
        {
            "vector": 1,
            "position embedding": 1,
            "first convolution": 1,
            "bias": 11,
            "hidden matrix": 6,
            "norm gain": 3,
            "head": 1,
        },
        {},
    ),
    (
        ("ResNet", "ForImageClassification", RESNET, (torch.zeros(1, 3, 32, 32),)),
        {"first convolution": 1, "convolution": 5, "norm gain": 6, "bias": 7, "head": 1},
        {},
    ),
    (
        ("DeepseekV3", "ForCausalLM", {}, (IDS,)),  # keys and values of latents; q is one matrix
        {
            "embedding": 1,
            "hidden matrix": 6,
            "norm gain": 5,
            "fused projection": 2,
            "head": 1,
        },
        {
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": Layout(sizes=(32, 8)),
            "model.layers.0.self_attn.kv_b_proj.weight": Layout("matrix", 0, 4, (16, 16)),
        },
    ),
]


@pytest.mark.parametrize(
    ("model", "roles", "layouts"),
    [
        *(pytest.param(*row, id=row[0][0]) for row in MODELS),
        *(pytest.param(*row, id=row[0][0], marks=pytest.mark.sweep) for row in LONGER),
    ],
)
def test_every_parameter_of_a_model_has_the_role_of_its_use(
    model: tuple[str, str, dict[str, Any], Any],
    roles: dict[str, int],
    layouts: dict[str, Layout],
) -> None:
    family, head, sizes, example = model
    found = rows(build(family, head, **sizes), example)
    assert {row.rule for row in found.values()} == {"graph"}
    assert Counter(row.role for row in found.values()) == roles
    filters = {name: FLAT for name, row in found.items() if row.role == "convolution"}
    not_plain = {name: row.layout for name, row in found.items() if row.layout != Layout()}
    assert not_plain == layouts | filters


HYBRIDS = [
    # family, the fused projections whose parts go through a cached convolution: outer, sizes
    ("Bamba", {"mamba.in_proj": (1, (128, 128, 8, 8, 8))}),
    ("Qwen3Next", {"linear_attn.in_proj_qkvz": (2, (16, 16, 32, 32))}),
    ("FalconH1", {"mamba.in_proj": (1, (1024, 1024, 8, 8, 128))}),
    ("Zamba2", {"mamba.in_proj": (1, (128, 128, 8, 8, 4))}),
    ("NemotronH", {"mixer.in_proj": (1, (64, 64, 8, 8, 4))}),
]


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        pytest.param(*row, id=row[0], marks=() if row[0] == "Bamba" else pytest.mark.sweep)
        for row in HYBRIDS
    ],
)
def test_a_cache_joins_no_parts_of_a_fused_projection(
    family: str, projections: dict[str, tuple[int, tuple[int, ...]]]
) -> None:
    """transformers' cache keeps the inputs of the convolution with every call."""
    model = build(family, "ForCausalLM", layers=2)
    found = rows(model, (IDS,))
    for part, (outer, sizes) in projections.items():
        layouts = {row.layout for name, row in found.items() if name.endswith(f"{part}.weight")}
        assert layouts == {Layout(outer=outer, sizes=sizes)}


def test_as_many_positions_as_features_make_no_head_of_gpt2s_last_projection() -> None:
    """No trace, and transformers' own Conv1D and accessors."""
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, **sizes))
    row = rows(model, None)["transformer.h.0.mlp.c_proj.weight"]
    assert (row.role, row.rule) == ("hidden matrix", "module")


@pytest.mark.sweep
def test_the_adapters_of_peft_are_lora_and_what_they_adapt_is_not() -> None:
    peft = pytest.importorskip("peft", reason="needs peft, pinned in requirements.txt")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("Llama", "ForCausalLM"), lora)
    found = rows(model.train(), {"input_ids": IDS, "labels": IDS})
    assert Counter(row.role for row in found.values()) == {
        "embedding": 1,
        "hidden matrix": 7,
        "norm gain": 3,
        "head": 1,
        "LoRA": 4,
    }
    by_use = {row.rule for row in found.values() if row.role == "LoRA"}
    assert by_use == {"graph"}
