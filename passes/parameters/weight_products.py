"""Which dims of a parameter a product sums over, and which become features of its output.

linear(x, w [M, N])         out dim 0, in dim 1        y[..., m]
addmm(b, x, w [M, N])       out dim 1, in dim 0        y[..., n]     Hugging Face's Conv1D
bmm(x, w [E, M, N])         out dim 2, in dim 1, a matrix for each e
einsum("bd,dhe->bhe")       out dims 1 and 2: one matrix [D, H E]
einsum("bd,edf,be->bf")     out dim 2, in dim 1, a matrix for each e, whose results be weighs
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import SOFTMAX
from moonfx.passes.graph.walks import reachable
from moonfx.passes.parameters.dataflow import FlowValue
from moonfx.passes.parameters.weight_uses import Use

Dims = tuple[int, ...]
PROBABILITIES = SOFTMAX | {aten.sigmoid.default, aten.log_sigmoid.default}


class WeightProduct(NamedTuple):
    """A product of a parameter with what the model computes.

    Args:
        op: the operator, and its output.
        out, summed: dims of the parameter that vary along the output's features, and along the sum.
        line: if `out` is one dim, the index along it of each feature, else None.
        axis: the output's dim of these features.
    """

    op: FlowValue
    out: tuple[int, ...]
    summed: tuple[int, ...]
    line: Tensor | None
    axis: int

    @property
    def positions(self) -> Tensor:
        """The index along `out` of each element of the output."""
        assert self.line is not None
        sizes = [1] * len(self.op.shape)
        sizes[self.axis] = len(self.line)
        return self.line.view(sizes).expand(self.op.shape)


class _Axes(NamedTuple):
    """Axes of the weight, of features and of the sum, and of the features in the output."""

    out: tuple[int, ...]
    summed: tuple[int, ...]
    axis: int


def _linear(op: FlowValue, place: int, weight: FlowValue) -> _Axes | None:
    return _Axes((0,), (1,), -1) if place == 1 and len(weight.shape) == 2 else None


def _right(op: FlowValue, place: int, weight: FlowValue) -> _Axes | None:
    """x @ w, or w @ x."""
    x = op.args[1 - place]
    if place not in (0, 1) or len(weight.shape) < 2 or not isinstance(x, FlowValue):
        return None
    if place == 1:
        return _Axes((-1,), (-2,), -1)
    return _Axes((-2,), (-1,), -2 if len(x.shape) > 1 else -1)


def _added(op: FlowValue, place: int, weight: FlowValue) -> _Axes | None:
    """b + x @ w, or b + w @ x."""
    if place == 2:
        return _Axes((-1,), (-2,), -1)
    return _Axes((-2,), (-1,), -2) if place == 1 else None


def _grouped(op: FlowValue, place: int, weight: FlowValue) -> _Axes | None:
    three = place == 1 and len(weight.shape) == 3
    return _Axes((-1,), (-2,), -1) if three and len(op.shape) == 2 else None


def _einsum(op: FlowValue, place: int, weight: FlowValue) -> _Axes | None:
    written, arrow, result = str(op.args[0]).replace(" ", "").partition("->")
    operands = list(op.args[1]) if len(op.args) > 1 else []
    terms = written.split(",")
    if not arrow or len(terms) != len(operands) or len(operands) < 2:
        return None
    own = terms[next(i for i, x in enumerate(operands) if x is weight)]
    others = {x: term for x, term in zip(operands, terms, strict=True) if x is not weight}
    gates = [x for x in others if _weighs(x)] if len(operands) > 2 else []
    if "." in own or len(set(own)) != len(own) or len(others) - len(gates) != 1:
        return None
    weighed = "".join(others.pop(x) for x in gates)  # of what these sum over, each has a matrix
    (other,) = others.values()
    out = [i for i, x in enumerate(own) if x in result and x not in other + weighed]
    summed = [i for i, x in enumerate(own) if x in other and x not in result + weighed]
    if not out or not summed:
        return None
    last = own[out[-1]]
    axis = result.index(last) - len(result) if "." not in result[result.index(last) :] else 0
    if "." in result and axis == 0:
        axis = result.index(last)
    return _Axes(tuple(out), tuple(summed), axis)


def _weighs(value: FlowValue) -> bool:
    """Whether a value is made of probabilities, and of no product or norm after them."""
    values = reachable([value], lambda x: () if is_product(x) else x.reads)
    return any(x.target in PROBABILITIES for x in values)


_PRODUCTS: dict[object, Callable[[FlowValue, int, FlowValue], _Axes | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _right,
    aten.mm.default: _right,
    aten.bmm.default: _right,
    aten.mv.default: _right,
    aten.addmm.default: _added,
    aten.baddbmm.default: _added,
    aten.einsum.default: _einsum,
}


def is_product(value: FlowValue) -> bool:
    return value.target in _PRODUCTS or "grouped_mm" in str(value.target)


def input_of(product: FlowValue) -> FlowValue | None:
    """What a product takes for its input where nothing else says which operand is the weight."""
    if product.target is aten.einsum.default:
        return next(iter(product.args[1]), None)
    place = 1 if _PRODUCTS.get(product.target) is _added else 0
    found = product.args[place] if len(product.args) > place else None
    return found if isinstance(found, FlowValue) else None


def product_of(use: Use) -> WeightProduct | None:
    """The product that a use is, None if the parameter is no weight of one."""
    op, value = use.op, use.value
    if not is_product(op) or use.at is None:
        return None
    place = next((i for i, x in enumerate(op.args) if x is value), -1)
    axes = _PRODUCTS.get(op.target, _grouped)(op, place, value)
    if axes is None or not op.shape:
        return None
    out, summed = (_varying(use.at, x) for x in (axes.out, axes.summed))
    line = None
    if len(out) == 1 and len(axes.out) == 1 and not set(out) & set(summed):
        line = _line(use.at[out[0]], axes.out[0])
    return WeightProduct(op, out, summed, line, axes.axis % len(op.shape))


def plane_of(shape: tuple[int, ...], products: Sequence[WeightProduct]) -> tuple[str, Dims] | None:
    """In which dims of a parameter the matrices lie, with a layout's kind; None if none says it."""
    rank = len(shape)
    used = {dim for p in products for dim in (*p.out, *p.summed)}
    if rank == 2:
        return "matrix", (0, 1)
    if used <= {rank - 2, rank - 1}:
        return "batch", (rank - 2, rank - 1)
    one = all(set(p.out) == {0} or set(p.summed) == {0} for p in products)
    if one and used >= {dim for dim, size in enumerate(shape) if size > 1}:
        return "flatten", ()
    if used <= {0, rank - 1}:
        return "middle", (0, rank - 1)
    return ("last", (0, 1)) if used <= {0, 1} else None


def _line(at: Tensor, axis: int) -> Tensor:
    """The indices along one axis, at the first of all others."""
    return at.movedim(axis, -1).flatten(0, -2)[0] if at.ndim > 1 else at


def _varying(at: tuple[Tensor, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The parameter's dims whose index is not the same all along some axes of a view of it."""
    return tuple(
        dim
        for dim, index in enumerate(at)
        if any(bool((line := _line(index, axis)).ne(line[:1]).any()) for axis in axes)
    )
