"""Heads: keys and values before repeat_kv, and heads folded into the batch.

    before  k [B, Hkv, N, D] -> unsqueeze -> expand [B, Hkv, G, N, D] -> reshape [B, Hq, N, D]
    after   k [B, Hkv, N, D], for attention with Hq = G * Hkv

Shape letters: B batch, Hq query heads, Hkv key/value heads, G group, N tokens, D head dim.
"""

from typing import Any

import torch
from torch import fx

from moonfx.capture import same_size
from moonfx.passes.nodes import argument, permutation
from moonfx.site import AttentionSite

aten = torch.ops.aten

COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
FOLDS = VIEWS | {aten.flatten.using_ints, aten.unflatten.int}


def fold_groups(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Key and value before repeat_kv, if both were repeated by the same group size."""
    inner_key, inner_value = grouped_source(key), grouped_source(value)
    if inner_key is None or inner_value is None:
        return key, value
    if same_size(inner_key.meta["val"].shape[1], inner_value.meta["val"].shape[1]):
        return inner_key, inner_value
    return key, value


def grouped_source(node: fx.Node) -> fx.Node | None:
    """k [B, Hkv, N, D] of unsqueeze -> expand -> reshape, or of repeat_interleave."""
    node = whole(node)
    if node.target is aten.repeat_interleave.self_int:
        source, dim = node.args[0], argument(node, 2, "dim")
        return source if dim in (1, -3) else None  # type: ignore[return-value]
    if node.target not in FOLDS:
        return None
    expanded = whole(node.args[0])
    if not (isinstance(expanded, fx.Node) and expanded.target is aten.expand.default):
        return None
    inserted = whole(expanded.args[0])
    if not isinstance(inserted, fx.Node) or inserted.target is not aten.unsqueeze.default:
        return None
    wide, narrow, out = (n.meta["val"].shape for n in (expanded, inserted, node))
    if len(wide) != 5 or len(narrow) != 5 or len(out) != 4 or inserted.args[1] not in (2, -3):
        return None
    kept = all(same_size(wide[d], narrow[d]) for d in (0, 1, 3, 4))
    if not kept or not same_size(out[1], wide[1] * wide[2]):
        return None
    if not all(same_size(out[d], wide[w]) for d, w in ((0, 0), (2, 3), (3, 4))):
        return None
    return whole(inserted.args[0])


def whole(node: Any) -> Any:
    """The node behind copies and slices that take everything, as x[:, :, None] leaves them."""
    while isinstance(node, fx.Node) and (node.target in COPIES or _takes_everything(node)):
        node = node.args[0]
    return node


def _takes_everything(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)


def untranspose(site: AttentionSite) -> None:
    """Takes key^T = transpose(key) apart, so that repeat_kv is seen and nothing is transposed."""
    rank = len(site.key.meta["val"].shape)
    if permutation(site.key) == [*range(rank - 2), rank - 1, rank - 2]:
        site.key, site.key_transposed = site.key.args[0], False  # type: ignore[assignment]
        if rank == 4:
            site.key, site.value = fold_groups(site.key, site.value)


def folded_heads(node: fx.Node) -> int | None:
    """H of a view between [B, H, Nq, Nk] and [B * H, Nq, Nk], in either direction, else None."""
    source = node.args[0] if node.target in FOLDS else None
    if not isinstance(source, fx.Node):
        return None
    wide, narrow = sorted((source.meta["val"].shape, node.meta["val"].shape), key=len, reverse=True)
    if (len(wide), len(narrow)) != (4, 3) or not isinstance(wide[1], int):
        return None
    kept = same_size(wide[2], narrow[1]) and same_size(wide[3], narrow[2])
    return wide[1] if kept and same_size(wide[0] * wide[1], narrow[0]) else None
