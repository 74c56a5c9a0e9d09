"""What the operators cost: FLOPs by the keys attended, for torch.utils.flop_counter."""

from collections.abc import Sequence
from typing import Any

import torch

import moonfx.ops.moba  # noqa: F401  (registers the operators)
from moonfx.ops.flop_formulas import register_flop_formula
from moonfx.ops.moba import INPUTS, parse


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
    query, key, value, *rest, out_shape=None, **named
) -> int:
    """Two products over the attended keys; no gate, and as if nothing were padded or packed."""
    del out_shape
    batch, heads, queries, dim = query
    return batch * heads * _keys(queries, key, rest, named) * 2 * (dim + value[3])


@register_flop_formula(torch.ops.moonfx.moba_attention_backward)
def backward_flops(  # type: ignore[no-untyped-def]
    grad_out, grad_lse, query, key, value, out, lse, routes, *rest, out_shape=None, **named
) -> int:
    """Five products: scores, dP and dV, dQ, dK; 2.5 times the forward for D = Dv."""
    del grad_out, grad_lse, out, lse, routes, out_shape
    batch, heads, queries, dim = query
    keys = _keys(queries, key, rest, named)
    return batch * heads * keys * 2 * (3 * dim + 2 * value[3])


def _keys(queries: int, key: Any, rest: Sequence[Any], named: dict[str, Any]) -> int:
    """`attended_keys` of a call with these arguments after its tensors."""
    # torch.utils.flop_counter hands over the output as well.
    arguments, _ = parse(rest, {name: x for name, x in named.items() if name in INPUTS})
    return attended_keys(queries, key[2], arguments.block, arguments.topk, arguments.causal)
