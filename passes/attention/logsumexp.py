"""Gives the operator's logsumexp to whoever reads that of the scores.

    before  lse = logsumexp(scores); share = sigmoid(lse - sink); ...; out = softmax(scores) @ value
    after   out, lse = moba_attention(...); share = sigmoid(lse - sink)

What is computed from lse before the output was there moves to after the operator. That is legal for
operators that compute each element by itself.
"""

import operator

import torch
from torch import fx

from moonfx.passes.attention.mask_operands import CannotWrite
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import call, origin
from moonfx.passes.graph.operators import CASTS, COPIES

aten = torch.ops.aten

_MOVABLE = (
    CASTS
    | COPIES
    | {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.rsub.Scalar, aten.neg.default),
        *(aten.sigmoid.default, aten.exp.default, aten.unsqueeze.default, aten.logaddexp.default),
    }
)


def give_lse(old: fx.Node, both: fx.Node, output: fx.Node, context: Context) -> None:
    """Replaces a logsumexp `old` by the operator's; `output` is what the operator stands before.

    Nothing is changed before it is known that all of it can be.

    Raises:
        CannotWrite: if what reads it cannot move to after the operator.
    """
    moved = _readers_before(old, output, context)
    value = old.meta["val"]
    new = call(operator.getitem, both, 1)
    if value.dim() == 4:
        new = call(aten.unsqueeze.default, new, -1)
    if value.dtype != new.meta["val"].dtype:
        new = call(aten.to.dtype, new, value.dtype)
    old.replace_all_uses_with(new)
    for node in reversed(moved):
        new.append(node)


def _readers_before(old: fx.Node, output: fx.Node, context: Context) -> list[fx.Node]:
    """What is computed from `old` before `output`, in order."""
    writes, mode = context.writes(old.graph), context.mode(output)
    if context.mode(old) != mode:
        raise CannotWrite("logsumexp of the scores is under another mode than the attention")
    known: set[fx.Node] = {old}
    moved: list[fx.Node] = []
    node = old.next if old < output else output
    while node is not output:
        if not known.isdisjoint(node.all_input_nodes):
            others = [n for n in node.all_input_nodes if n not in known]
            if node.target not in _MOVABLE or context.mode(node) != mode:
                raise CannotWrite(f"logsumexp of the scores is read by '{node.name}' on the way")
            if any(origin(n) in writes for n in (node, *others)):
                raise CannotWrite(f"what '{node.name}' reads is written to in place")
            known.add(node)
            moved.append(node)
        node = node.next
    if not known.isdisjoint(output.all_input_nodes):
        raise CannotWrite("logsumexp of the scores enters the attention itself")
    return moved
