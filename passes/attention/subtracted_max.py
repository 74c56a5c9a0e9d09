"""The maximum that hand-written attention subtracts before exp(): softmax does not see it.

before  s - s.amax(-1, keepdim=True)        s - s.max(-1, keepdim=True).values.detach()
after   s
"""

import operator
from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import argument
from moonfx.passes.graph.operators import COPIES, DETACH

aten = torch.ops.aten

_LOOK_THROUGH = COPIES | {DETACH}
_WRONG = "the maximum that is subtracted is not one number per query: take it over the keys (-1)"


def peak_of(node: object, scores: object) -> set[fx.Node] | str | None:
    """The nodes between `scores` and `node`, if that is a maximum of them which includes all keys.

    None if it is no maximum of these scores at all; the reason if it is over the wrong dim.
    """
    if not isinstance(node, fx.Node) or not isinstance(scores, fx.Node):
        return None
    inner: set[fx.Node] = set()
    peak: Any = _uncopied(node, inner)
    restored: int | None = None
    if peak.target is aten.unsqueeze.default:
        restored = int(peak.args[1])
        inner.add(peak)
        peak = _uncopied(peak.args[0], inner)
    if peak.target is operator.getitem and peak.args[1] == 0:
        inner.add(peak)
        peak = peak.args[0]
    if peak.target in (aten.amax.default, aten.max.dim):
        dims, keepdim = argument(peak, 1, "dim", []), argument(peak, 2, "keepdim", False)
    elif peak.target is aten.max.default:
        dims, keepdim = [], True
    else:
        return None
    inner.add(peak)
    if _uncopied(peak.args[0], inner) is not _uncopied(scores, set()):
        return None
    rank = len(scores.meta["val"].shape)
    reduced = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)} or set(
        range(rank)
    )
    if restored is not None and not keepdim:
        keepdim = reduced == {rank - 1} and restored % rank == rank - 1
    if peak.target is aten.max.default:
        return inner
    return inner if keepdim and rank - 1 in reduced else _WRONG


def _uncopied(node: object, passed: set[fx.Node]) -> fx.Node:
    """The node that copies and detach() were made of, which are added to `passed`."""
    assert isinstance(node, fx.Node)
    while node.target in _LOOK_THROUGH:
        passed.add(node)
        node = node.args[0]
        assert isinstance(node, fx.Node)
    return node
