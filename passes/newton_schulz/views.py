"""Views and copies of a matrix, which stand for it or for its transpose.

X[:, :]    X.clone()    X.unsqueeze(0)    X.reshape(-1, m, n)    X.mT    X.type_as(Y)
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import permutation
from moonfx.passes.newton_schulz.operands import Get, Run, Unclear, named, shape
from moonfx.passes.newton_schulz.polynomials import Terms, transposed

aten = torch.ops.aten


def same(node: fx.Node, get: Get) -> Terms:
    return get(node.args[0])


def _reshaped(node: fx.Node, get: Get) -> Terms:
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


_CONJUGATES = (aten.mH.default, aten.matrix_H.default, aten.adjoint.default)


def _turned(node: fx.Node, get: Get) -> Terms:
    order = permutation(node)
    if order is None and node.target in _CONJUGATES:
        return transposed(get(node.args[0]))
    rank = len(order or [])
    if order is None or order[:-2] != list(range(rank - 2)):
        raise Unclear("dims are permuted that are not the matrix's own")
    return transposed(get(node.args[0])) if order[-1] != rank - 1 else get(node.args[0])


# Views of a matrix as its transpose, or that may be.
TURNS: dict[Any, Run] = {
    **named("permute.default transpose.int t.default numpy_T.default matrix_H.default", _turned),
    **named("mT.default mH.default adjoint.default", _turned),
    **named("swapaxes.default swapdims.default movedim.int", _turned),
}
# Their result is the operand in another dtype or on another device.
CASTS = named("to.dtype to.dtype_layout to.other to.device _to_copy.default", same) | (
    named("type_as.default", same)
)
# Their result has the operand's entries in the operand's order.
RESHAPES = {
    **named("view.default reshape.default _unsafe_view.default view_as.default", _reshaped),
    **named("reshape_as.default flatten.using_ints unflatten.int", _reshaped),
    **named("unsqueeze.default squeeze.default squeeze.dim squeeze.dims", _reshaped),
    **named("slice.Tensor select.int narrow.default", _reshaped),
    **named("expand.default expand_as.default", _reshaped),
}
# All that stands for its operand, or the operand's transpose; none of them writes.
VIEWS: dict[Any, Run] = {
    **named("clone.default contiguous.default detach.default alias.default", same),
    **named("conj.default resolve_conj.default resolve_neg.default positive.default", same),
    **named("lift_fresh.default", same),
    **CASTS,
    **RESHAPES,
    **TURNS,
}

# The second operand says a size or a dtype.
OF_FIRST = {
    *(aten.view_as.default, aten.reshape_as.default, aten.expand_as.default),
    *(aten.to.other, aten.type_as.default),
}
