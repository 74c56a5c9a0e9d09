"""Views and copies of a matrix, which stand for it or for its transpose.

X[:, :]    X.clone()    X.unsqueeze(0)    X.reshape(-1, m, n)    X.mT    X.type_as(Y)
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import permutation
from moonfx.passes.graph.operators import CASTS, FOLDS, SWAPS, TRANSPOSES
from moonfx.passes.newton_schulz.operands import GetTerms, TermRule, Unclear, named, shape
from moonfx.passes.newton_schulz.polynomials import Terms, transposed

aten = torch.ops.aten


def same(node: fx.Node, get: GetTerms) -> Terms:
    return get(node.args[0])


def _reshaped(node: fx.Node, get: GetTerms) -> Terms:
    """The same entries in the same order: the same matrices, if rows and columns are."""
    given, made = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if given[-2:] != made[-2:] or _count(given) != _count(made):
        raise Unclear("a matrix is broadcast or reshaped inside the step")
    return get(node.args[0])


def _count(sizes: list[Any]) -> Any:
    """How many matrices there are in a batch."""
    found: Any = 1
    for each in sizes[:-2]:
        found = found * each
    return found


_CONJUGATES = {aten.mH.default, aten.matrix_H.default, aten.adjoint.default}


def _permuted(node: fx.Node, get: GetTerms) -> Terms:
    order = permutation(node)
    if order is None and node.target in _CONJUGATES:
        return transposed(get(node.args[0]))
    rank = len(order or [])
    if order is None or order[:-2] != list(range(rank - 2)):
        raise Unclear("dims are permuted that are not the matrix's own")
    return transposed(get(node.args[0])) if order[-1] != rank - 1 else get(node.args[0])


# Views that may be of a matrix as its transpose.
_PERMUTES = SWAPS | TRANSPOSES | _CONJUGATES | {aten.permute.default, aten.movedim.int}
# Their result has the operand's entries in the operand's order.
RESHAPES: dict[Any, TermRule] = {
    **dict.fromkeys(FOLDS, _reshaped),
    **named("view_as.default reshape_as.default", _reshaped),
    **named("unsqueeze.default squeeze.default squeeze.dim squeeze.dims", _reshaped),
    **named("slice.Tensor select.int narrow.default", _reshaped),
    **named("expand.default expand_as.default", _reshaped),
}
# All that stands for its operand, or the operand's transpose; none of them writes.
VIEWS: dict[Any, TermRule] = {
    **named("clone.default contiguous.default detach.default alias.default", same),
    **named("conj.default resolve_conj.default resolve_neg.default positive.default", same),
    **named("lift_fresh.default", same),
    **dict.fromkeys(CASTS, same),
    **RESHAPES,
    **dict.fromkeys(_PERMUTES, _permuted),
}

# Their second operand says a size or a dtype, and no entry of it is read.
OF_FIRST = {
    *(aten.view_as.default, aten.reshape_as.default, aten.expand_as.default),
    *(aten.to.other, aten.type_as.default),
}
