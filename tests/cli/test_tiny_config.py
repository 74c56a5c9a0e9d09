"""A configuration that was made small keeps the kinds of its layers and the ratios of its heads."""

import pytest

from moonfx.cli.tiny_config import Sizes, tiny

transformers = pytest.importorskip("transformers")

# model type, what must hold of the small configuration
KEPT = [
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    ("gemma", {"num_key_value_heads": 4}),
    ("starcoder2", {"num_key_value_heads": 2, "embedding_dropout": 0.0}),
    ("gemma2", {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2}),
    ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 99}),
    ("deepseek_v3", {"qk_head_dim": 24, "head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32}),
    ("gpt_neo", {"attention_layers": ["global", "local"], "window_size": 8}),
    ("gemma4_text", {"layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("name", "kept"), KEPT, ids=[k[0] for k in KEPT])
def test_small_configurations_keep_their_structure(name: str, kept: dict[str, object]) -> None:
    default = transformers.CONFIG_MAPPING[name]()
    before = default.to_dict()
    small = tiny(default)
    assert {field: getattr(small, field) for field in kept} == kept
    assert type(small) is type(default)
    assert default.to_dict() == before


def test_sizes_are_the_callers_to_choose() -> None:
    small = tiny(transformers.Qwen3Config(), Sizes(layers=5, positions=4096))
    assert (small.num_hidden_layers, len(small.layer_types)) == (5, 5)
    assert (small.hidden_size, small.head_dim, small.max_position_embeddings) == (64, 16, 4096)


def test_layers_alone_can_be_cut() -> None:
    small = tiny(transformers.Gemma2Config(), narrow=False)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert (small.hidden_size, small.num_attention_heads, small.sliding_window) == (2304, 8, 4096)


def test_what_is_already_smaller_stays() -> None:
    given = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    small = tiny(given)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (32, 2, 1)
    assert small.num_hidden_layers == 1
