"""Keys and values before they were repeated for each query head of a group.

repeat_kv(k)    k -> unsqueeze -> expand [B, Hkv, G, N, D] -> reshape [B, Hq, N, D]
k.repeat_interleave(G, 1)    cat([k[:, :, None]] * G, 2).flatten(1, 2)    stack([k] * G, 2)...
"""

from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.graph.nodes import argument, insert, permutation
from moonfx.passes.graph.operators import COPIES, FOLDS

aten = torch.ops.aten

_JOINS = {aten.cat.default, aten.stack.default}


def ungrouped(node: fx.Node, dim: int, before: fx.Node) -> fx.Node | None:
    """x with node == repeat_interleave(x, group, dim), or None."""
    node = uncopied(node)
    if node.op != "call_function":
        return None
    if (order := permutation(node)) is not None:
        inner = ungrouped(node.args[0], order[dim], before)  # type: ignore[arg-type]
        if inner is None:
            return None
        return insert(aten.permute.default, (inner, order), before)
    if node.target is aten.repeat_interleave.self_int:
        source, along = node.args[0], argument(node, 2, "dim")
        same = isinstance(along, int) and along % len(node.meta["val"].shape) == dim
        return source if same else None  # type: ignore[return-value]
    if node.target not in FOLDS:
        return one_repeated(node, dim)
    wide = uncopied(node.args[0])
    before_fold, after = wide.meta["val"].shape, node.meta["val"].shape
    if len(before_fold) != len(after) + 1 or not same_size(
        after[dim], before_fold[dim] * before_fold[dim + 1]
    ):
        return None
    kept = [d for d in range(len(before_fold)) if d not in (dim, dim + 1)]
    rest = [d for d in range(len(after)) if d != dim]
    if not all(same_size(before_fold[a], after[b]) for a, b in zip(kept, rest, strict=True)):
        return None
    narrow = one_repeated(wide, dim + 1)
    if narrow is None:
        return None
    if narrow.target is aten.unsqueeze.default:
        at = int(narrow.args[1]) % len(before_fold)  # type: ignore[arg-type]
        if at == dim + 1:
            return uncopied(narrow.args[0])
    return insert(aten.squeeze.dim, (narrow, dim + 1), before)


def one_repeated(node: fx.Node, dim: int) -> fx.Node | None:
    """x with size 1 at dim, that was repeated along dim and nowhere else; None if it was not."""
    if node.target in _JOINS:
        parts, along = node.args[0], int(argument(node, 1, "dim", 0))
        assert isinstance(parts, list | tuple)
        first = parts[0]
        if not isinstance(first, fx.Node) or any(p is not first for p in parts):
            return None
        if along % len(node.meta["val"].shape) != dim:
            return None
        if node.target is aten.stack.default:
            return insert(aten.unsqueeze.default, (first, dim), node)
        return first if same_size(first.meta["val"].shape[dim], 1) else None
    if node.target not in (aten.expand.default, aten.repeat.default):
        return None
    source = uncopied(node.args[0])
    wide, narrow = node.meta["val"].shape, source.meta["val"].shape
    if len(wide) != len(narrow) or not same_size(narrow[dim], 1):
        return None
    kept = all(same_size(wide[d], narrow[d]) for d in range(len(wide)) if d != dim)
    return source if kept else None


def uncopied(node: Any) -> Any:
    """The node under copies and slices that take everything, as x[:, :, None] leaves them."""
    while isinstance(node, fx.Node) and (node.target in COPIES or _takes_everything(node)):
        node = node.args[0]
    return node


def _takes_everything(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)
