"""What a softmax is, however it is spelled: its operand, its dim and its result.

softmax(s, -1)                                          _safe_softmax(s, -1)
log_softmax(s, -1).exp()                                (s - s.logsumexp(-1, keepdim=True)).exp()
e = s.exp(); e / e.sum(-1, keepdim=True)                e * e.sum(-1, keepdim=True).reciprocal()
e = s.exp(); (e @ v) / e.sum(-1, keepdim=True)          the division comes after the product
"""

from dataclasses import dataclass, field

import torch
from torch import fx

from moonfx.passes.graph.nodes import argument
from moonfx.passes.graph.operators import DIVIDE, EXP, LOG_SOFTMAX, MULTIPLY, SOFTMAX, SUBTRACT

aten = torch.ops.aten

_SUM = aten.sum.dim_IntList
_RECIPROCAL = {aten.reciprocal.default, aten.reciprocal_.default}


@dataclass
class Softmax:
    """One softmax.

    Args:
        node: its result; with `total`, what is still to be divided by it.
        operand: the scores.
        dim: as it was given.
        inner: the nodes that it consists of.
        total: the sum of `node` that the product with the values is divided by, or None.
    """

    node: fx.Node
    operand: fx.Node
    dim: int
    inner: set[fx.Node] = field(default_factory=set)
    total: fx.Node | None = None


def read_softmax(node: fx.Node) -> Softmax | None:
    """The softmax that a node computes or, being an exp(), begins; None if it is none."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        return None
    if node.target in SOFTMAX:
        return Softmax(node, operand, int(argument(node, 1, "dim")), {node})
    if node.target not in EXP:
        return None
    if operand.target in LOG_SOFTMAX:
        scores, dim = operand.args[0], int(argument(operand, 1, "dim"))
        return Softmax(node, scores, dim, {node, operand})  # type: ignore[arg-type]
    if operand.target in SUBTRACT and operand.kwargs.get("alpha", 1) == 1:
        scores, logarithm = operand.args[:2]
        if (
            isinstance(logarithm, fx.Node)
            and logarithm.target is aten.logsumexp.default
            and logarithm.args[0] is scores
            and (over := _reduced(logarithm)) is not None
        ):
            inner = {node, operand, logarithm}
            return Softmax(node, scores, over, inner)  # type: ignore[arg-type]
    return _over_its_sum(node, operand)


def _over_its_sum(exp: fx.Node, scores: fx.Node) -> Softmax | None:
    """exp(s) that is divided by its own sum, before or after the product with the values."""
    sums = [u for u in exp.users if u.target is _SUM]
    if len(sums) != 1:
        return None
    (total,) = sums
    dim = _reduced(total)
    if dim is None or total.kwargs.get("dtype") not in (None, exp.meta["val"].dtype):
        return None
    inner, divisor, by = {exp, total}, total, DIVIDE
    inverses = [u for u in total.users if u.target in _RECIPROCAL]
    if inverses:
        divisor, by = inverses[0], MULTIPLY
        inner.add(divisor)
    for user in exp.users:
        operands = [user.args[0], user.args[1]] if user.target in by else []
        if operands == [exp, divisor] or (operands == [divisor, exp] and by is MULTIPLY):
            return Softmax(user, scores, dim, inner | {user})
    return Softmax(exp, scores, dim, inner, divisor) if by is DIVIDE else None


def logarithm_of(softmax: Softmax) -> fx.Node | None:
    """logsumexp of the same scores over the keys, apart from the softmax; None if there is none."""
    found = [
        u
        for u in softmax.operand.users
        if u.target is aten.logsumexp.default and u not in softmax.inner
    ]
    rank = len(softmax.operand.meta["val"].shape)
    if len(found) != 1 or rank != 4:
        return None
    dims = argument(found[0], 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims)
    return found[0] if [d % rank for d in dims] == [rank - 1] else None


def _reduced(node: fx.Node) -> int | None:
    """The one dim that a reduction takes away, and keeps as 1; None if it is not like that."""
    dims, keepdim = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if not keepdim or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    return int(dims[0])
