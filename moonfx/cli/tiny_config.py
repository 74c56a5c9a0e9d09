"""Makes any Hugging Face configuration small and leaves the structure of its attention as it is.

    before  Gemma2Config()           26 layers of width 2304, 8 heads for 4, a window of 4096
    after   tiny(Gemma2Config())     2 layers of width 64, 4 heads for 2, a window of 8

Sizes are data: `Sizes` for what a caller may choose, `FIELDS` for the names under which
configurations hold them, `OVERRIDES` for what one architecture alone needs. Layers are picked from
the configuration's own so that each kind of layer appears, and every list that has one entry per
layer is cut to the picked ones. Grouped-query heads stay grouped, and multi-query heads one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

Fields = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What a caller may choose.

    Args:
        layers: at least this many; more, up to `most`, where it takes more to show each kind.
        positions: rows of the tables of positions.
        vocabulary: tokens.
        window: tokens of sliding windows and attention chunks.
    """

    layers: int = 2
    most: int = 4
    positions: int = 64
    vocabulary: int = 100
    window: int = 8

    width: ClassVar[int] = 64
    heads: ClassVar[int] = 4
    head_dim: ClassVar[int] = 16
    inner: ClassVar[int] = 96


# A small value, a number or the name of a size -> the fields that take it.
FIELDS: dict[str | int, str] = {
    "width": "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim"
    " lru_width input_embedding_size output_embedding_size hidden_size_global attention_hidden_size"
    " pronunciation_embed_dim shape_embed_dim out_hidden_size"
    " linear_hidden_size adapter_in_dim adapter_out_dim adapter_input_size conv_output_size",
    "heads": "num_attention_heads n_head n_heads num_heads attention_heads linear_num_heads"
    " decoder_attention_heads encoder_attention_heads num_encoder_attention_heads"
    " num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads",
    "head_dim": "head_dim dim_head d_head d_kv attention_head_size swa_head_dim v_head_dim"
    " swa_v_head_dim qk_nope_head_dim kv_channels attention_head_dim global_head_dim"
    " linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim",
    "inner": "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner n_inner"
    " ffn_hidden_size feed_forward_size d_ff mlp_dim intermediate_size_mlp dense_intermediate_size"
    " shared_intermediate_size prefix_dense_intermediate_size",
    "positions": "max_position_embeddings n_positions max_seq_len n_ctx context_length"
    " max_target_positions",
    "vocabulary": "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size",
    "window": "sliding_window attention_chunk_size local_attention window_size sliding_window_size"
    " attention_window_size keep_window_size local_attention_window_len",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"
    " num_codebooks patch_size linear_conv_kernel_dim index_n_heads index_topk n_mamba_heads",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"
    " num_hash_layers linear_num_key_heads altup_num_inputs hc_mult hc_count",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts"
    " moe_num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index"
    " mamba_n_groups n_groups mamba_ngroups num_mem_blocks",
    8: "qk_rope_head_dim rotary_dim laurel_rank hidden_size_per_layer_input time_step_rank"
    " mamba_dt_rank mamba_chunk_size chunk_size mamba_d_state state_size ssm_state_size"
    " adapter_rank image_size gated_norm_rank hc_lowrank num_mel_bins",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size kv_lora_rank"
    " q_lora_rank o_lora_rank moe_shared_expert_intermediate_size router_hidden_size"
    " shared_experts_intermediate_size",
}  # fmt: skip
DEPTH = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
    "num_blocks",
    "num_decoder_layers",
    "num_encoder_layers",
]
KEY_HEADS = [
    "num_key_value_heads",
    "num_kv_heads",
    "kv_n_heads",
    "swa_num_key_value_heads",
    "num_query_groups",
    "num_global_key_value_heads",
]
KINDS = ("layer_types", "layers_block_type", "attention_layers", "block_types", "attn_layers")

UNSAID = ("model_type", "transformers_version", "architectures", "dtype")

# What one architecture alone needs, by model type; of sub-configurations too. Mostly fields that
# default to None, which the library fills in only from a checkpoint's own configuration.
OVERRIDES: dict[str, Fields] = {
    "axk2": {"index_topk": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 32, "qk_nope_head_dim": 24, "index_topk": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {  # the depth is layers of a stack until the library multiplies it by the cycles
        "num_layers_per_stack": None,
        "num_hidden_layers": 1,
        "L_cycles": 1,
        "L_bp_cycles": [1],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal_audio": {
        "depthwise_separable_out_channel": 8,
        "ext_pw_out_channel": 8,
        "nemo_conv_channels": 8,
    },
    # Their checkpoints' configurations say it; the library's own leaves it to the model's code.
    "qwen2_vl_text": {"rope_parameters": {"mrope_section": [4, 2, 2]}},
    "qwen2_5_vl_text": {"rope_parameters": {"mrope_section": [4, 2, 2]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 48)},
    "roc_bert": {"shape_vocab_size": 100, "pronunciation_vocab_size": 100},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
        "hybrid_layer_ids": [1, 3],
    },
}

# Layers of the default that are kept, where the first ones of each kind would not fit together.
PICKS: dict[str, tuple[int, ...]] = {
    "gemma3n_text": (0, 4, 20, 24),  # two whose keys and values later layers share, and two sharers
    "zamba": (0, 1, 2, 7),
    "zamba2": (0, 6, 7, 12),
}


def tiny(default: Any, sizes: Sizes = Sizes(), narrow: bool = True) -> Any:
    """A small configuration of the same class.

    Args:
        default: a configuration that `transformers` made; it is not changed.
        sizes: what to make it of.
        narrow: False keeps widths, heads, tokens and windows, and cuts layers alone.
    Raises:
        Exception: what the configuration's own validation raises when it cannot be so small.
    """
    return type(default)(**changed(default, sizes, narrow))


def changed(default: Any, sizes: Sizes, narrow: bool) -> Fields:
    """The arguments that make a configuration anew, small."""
    old = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    new: Fields = {k: v for k, v in default.to_diff_dict().items() if k not in UNSAID}
    for name in type(default).sub_configs:
        part = old.get(name)
        if isinstance(part, Mapping):
            raise TypeError(f"{name} is a mapping")
        if part is not None:
            new[name] = changed(part, sizes, narrow) | {"model_type": part.model_type}
    if narrow:
        new |= narrower(old, sizes) | key_heads(old, sizes) | small_tokens(old, sizes)
        new |= {k: 0.0 for k in old if "drop" in k and isinstance(old[k], float)}
        if isinstance(old.get("rope_parameters"), Mapping):
            new["rope_parameters"] = small_rope(old["rope_parameters"], sizes)
    if (picked := picked_layers(default.model_type, old, sizes)) is not None:
        new |= fewer_layers(default, old | new, picked, sizes if narrow else None)
    for name, value in copy.deepcopy(OVERRIDES.get(default.model_type, {})).items():
        if narrow or old.get(name) is None:
            both = isinstance(value, dict) and isinstance(new.get(name), dict)
            new[name] = new[name] | value if both else value
    return new


def narrower(old: Fields, sizes: Sizes) -> Fields:
    """Widths, heads, tokens: what `FIELDS` names, where it is larger than the small value."""
    new: Fields = {}
    for size, names in FIELDS.items():
        small = getattr(sizes, size) if isinstance(size, str) else size
        for name in names.split():
            value = old.get(name)
            if shrinks(value, small):
                new[name] = small
            elif isinstance(value, list | tuple) and value and all(map(is_number, value)):
                new[name] = type(value)(min(v, small) for v in value)
    if is_number(old.get("qk_rope_head_dim")) and "head_dim" in new:  # one or the other's name
        if old["head_dim"] == old["qk_rope_head_dim"]:
            new["head_dim"] = new["qk_rope_head_dim"]
        if is_number(old.get("qk_head_dim")):
            new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    return new


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shrinks(old: Any, new: int) -> bool:
    return is_number(old) and old > new


def key_heads(old: Fields, sizes: Sizes) -> Fields:
    """Fewer key than query heads stay fewer, and one stays one."""
    heads = next((old[h] for h in FIELDS["heads"].split() if isinstance(old.get(h), int)), None)
    new = {}
    for name in KEY_HEADS:
        if isinstance(old.get(name), int):
            same = heads is not None and old[name] >= heads
            new[name] = sizes.heads if same else min(old[name], max(1, sizes.heads // 2))
    return new


def picked_layers(model_type: str, old: Fields, sizes: Sizes) -> list[int] | None:
    """Which layers to keep, so that each kind appears; None where there are no layers."""
    depth = next((old[d] for d in DEPTH if is_number(old.get(d))), None)
    if depth is None:
        return None
    if model_type in PICKS:
        return list(PICKS[model_type])
    lists = [old[k] for k in KINDS if isinstance(old.get(k), list | tuple) and len(old[k]) == depth]
    kinds = [tuple(str(kind[i]) for kind in lists) for i in range(depth)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    others = [i for i in range(depth) if i not in first]
    count = min(depth, max(sizes.layers, min(len(first), sizes.most)))
    return sorted((first + others)[:count])


def fewer_layers(default: Any, old: Fields, picked: list[int], sizes: Sizes | None) -> Fields:
    """The depth, every list with one entry per layer, and what single layers have of their own."""
    depths = {old[d] for d in DEPTH if is_number(old.get(d))}
    new: Fields = {d: len(picked) for d in DEPTH if is_number(old.get(d))}
    for name, value in old.items():
        if isinstance(value, list | tuple) and len(value) in depths:
            new[name] = type(value)(value[i] for i in picked)
    if own := default.to_dict().get("per_layer_config"):
        fixed = OVERRIDES.get(default.model_type, {})
        at = {int(i): dict(fields) for i, fields in own.items()}
        if sizes is not None:
            for fields in at.values():
                fields |= narrower(fields, sizes) | key_heads(fields, sizes)
                fields |= {k: v for k, v in fixed.items() if k in fields}
        new["per_layer_config"] = {j: at[i] for j, i in enumerate(picked) if i in at}
    return new


def small_tokens(old: Fields, sizes: Sizes) -> Fields:
    """Special tokens beyond the vocabulary become its last ones."""
    new: Fields = {}
    small: dict[str, int] = {}
    for name, value in old.items():
        if name.endswith(("token_id", "token_index")) and (
            isinstance(value, list) or shrinks(value, sizes.vocabulary - 1)
        ):
            new[name] = small.setdefault(str(value), sizes.vocabulary - 1 - len(small))
    return new


def small_rope(old: Mapping[str, Any], sizes: Sizes) -> Fields:
    """Sections of a rotary dimension are shares of it."""
    new: Fields = {}
    for name, value in old.items():
        if isinstance(value, Mapping):
            new[name] = small_rope(value, sizes)
        elif name == "mrope_section":
            half = sizes.head_dim // 2
            new[name] = [half - 2 * (half // 3), half // 3, half // 3]
        else:
            new[name] = value
    return new
