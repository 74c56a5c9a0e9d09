"""What the operators cost: FLOPs by the keys attended, for torch.utils.flop_counter."""

import torch

import moonfx.ops.moba  # noqa: F401  (registers the operators)
from moonfx.ops.flop_formulas import register_flop_formula


def attended_keys(queries: int, keys: int, block: int, topk: int, causal: bool = True) -> int:
    """Keys that `queries` last of `keys` tokens attend together, per head: the selected work."""
    if not causal:
        return queries * min(keys, block * topk)

    def before(position: int) -> int:
        """Keys that the queries at positions 0 .. position - 1 attend."""
        dense = min(position, block * topk)
        full, part = divmod(position - dense, block)
        own = full * block * (block + 1) // 2 + part * (part + 1) // 2
        return dense * (dense + 1) // 2 + (position - dense) * (topk - 1) * block + own

    return before(keys) - before(keys - queries)


@register_flop_formula(torch.ops.moonfx.moba_attention)
def forward_flops(  # type: ignore[no-untyped-def]
    query, key, value, block, topk, sinks=0, scale=None, key_mask=None, causal=True, *rest, **named
) -> int:
    """Two products over the attended keys; no gate, and as if nothing were padded or packed."""
    batch, heads, queries, dim = query
    keys = attended_keys(queries, key[2], block, topk, causal)
    return batch * heads * keys * 2 * (dim + value[3])


@register_flop_formula(torch.ops.moonfx.moba_attention_backward)
def backward_flops(  # type: ignore[no-untyped-def]
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    routes,
    block,
    topk,
    *rest,
    causal=True,
    **named,
) -> int:
    """Five products: scores, dP and dV, dQ, dK; 2.5 times the forward for D = Dv."""
    batch, heads, queries, dim = query
    causal = rest[3] if len(rest) > 3 else causal  # after sinks, scale and key_mask
    keys = attended_keys(queries, key[2], block, topk, causal)
    return batch * heads * keys * 2 * (3 * dim + 2 * value[3])
