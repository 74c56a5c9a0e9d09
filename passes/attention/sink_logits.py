"""Attention sink logits: one more column of scores, to which no value belongs (GPT-OSS).

    before  cat([scores, sinks [1, Hq, 1, 1].expand(B, Hq, Nq, 1)], -1) -> softmax -> [..., :-1]
    after   Sink(logits=sinks [1, Hq, 1, 1], first=False)

The column must be the same for every row and query, and be cut off again after the softmax.
"""

from dataclasses import dataclass, field

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.attention.heads import views_itself
from moonfx.passes.graph.nodes import argument
from moonfx.passes.graph.operators import CASTS, COPIES

aten = torch.ops.aten

_REPEATS = {aten.expand.default, aten.repeat.default, aten.expand_as.default}


@dataclass
class Sink:
    """Sink logits that are joined to the scores.

    Args:
        node: the cat.
        logits: one per query head, or one for all; every other dim is 1.
        first: they come before the keys, not after.
        inner: the nodes between logits and cat.
    """

    node: fx.Node
    logits: fx.Node
    first: bool
    inner: set[fx.Node] = field(default_factory=set)


def join_of(node: fx.Node, scores: fx.Node) -> Sink | str:
    """What a cat joins to scores [B, Hq, Nq, Nk], or why it is no column of sink logits."""
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    (column,) = (p for p in parts if isinstance(p, fx.Node) and p is not scores)
    sizes = scores.meta["val"].shape
    if int(argument(node, 1, "dim", 0)) % len(sizes) != len(sizes) - 1:
        return "something is joined to the scores (cat), not along the keys"
    if len(sizes) != 4:
        return f"attention sink logits are joined to scores of {len(sizes)} dimensions, not 4"
    if not same_size(column.meta["val"].shape[-1], 1):
        return "more than one column is joined to the scores (cat): no attention sink logits"
    passed: set[fx.Node] = set()
    current: fx.Node = column
    while not _one_per_head(current):
        source = current.args[0] if current.op == "call_function" and current.args else None
        keeps = current.target in _REPEATS | COPIES | CASTS or views_itself(current)
        if not keeps or not isinstance(source, fx.Node):
            return (
                "the attention sink logits are not proved to be one number per head; expand [heads]"
            )
        passed.add(current)
        current = source
    heads = current.meta["val"].shape[-3]
    for_all = same_size(heads, 1) and isinstance(sizes[1], int)
    if not same_size(heads, sizes[1]) and not for_all:
        return "the attention sink logits are not one per query head"
    return Sink(node, current, first=parts[0] is column, inner=passed)


def _one_per_head(node: fx.Node) -> bool:
    """[1, Hq, 1, 1] or [Hq, 1, 1] of floats."""
    value = node.meta["val"]
    if not value.dtype.is_floating_point or value.dim() not in (3, 4):
        return False
    return all(same_size(n, 1) for d, n in enumerate(value.shape) if d != value.dim() - 3)


def cuts_off(sliced: fx.Node, sink: Sink) -> bool:
    """Whether a slice of the probabilities leaves exactly the keys, without the sink's column."""
    source = sliced.args[0]
    assert isinstance(source, fx.Node)
    rank = len(sliced.meta["val"].shape)
    whole, rest = source.meta["val"].shape[-1], sliced.meta["val"].shape[-1]
    dim, start = argument(sliced, 1, "dim", 0), argument(sliced, 2, "start")
    along_keys = dim % rank == rank - 1 and argument(sliced, 4, "step", 1) in (1, None)
    if not along_keys or not same_size(rest + 1, whole):
        return False
    return start == 1 if sink.first else start in (0, None)
