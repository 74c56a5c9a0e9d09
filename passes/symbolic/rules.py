"""What each operator's value at an index is, in terms of its arguments' values.

A rule is `(reader, node, index) -> expression`, or None where the value is not known: the node is
then a leaf. The reader rounds a rule's result to the node's dtype, so that rules state mathematics.
"""

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from moonfx.passes.graph.operators import CASTS
from moonfx.passes.symbolic import creation_rules as creation
from moonfx.passes.symbolic import pointwise_rules as pointwise
from moonfx.passes.symbolic import view_rules as views
from moonfx.passes.symbolic.expressions import Rule

aten = torch.ops.aten
_OPERATORS: list[tuple[Rule, Sequence[str]]] = [
    (
        views.same,
        ["alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy", "lift_fresh"],
    ),
    (creation.arange, ["arange", "arange.start", "arange.start_step"]),
    (creation.fill(1), ["full", "full_like"]),
    (creation.fill(2), ["new_full"]),
    (creation.fill(0, "s"), ["scalar_tensor"]),
    (creation.filled_with(0), ["zeros", "zeros_like", "new_zeros"]),
    (creation.filled_with(1), ["ones", "ones_like", "new_ones"]),
    (views.unsqueeze, ["unsqueeze"]),
    (views.same, ["expand", "expand_as", "broadcast_to"]),
    (views.permute, ["permute", "transpose.int", "swapaxes", "swapdims", "movedim.int"]),
    (views.permute, ["t", "mT", "numpy_T"]),
    (views.reshape, ["view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"]),
    (views.reshape, ["squeeze", "squeeze.dim", "squeeze.dims"]),
    (views.sliced, ["slice.Tensor"]),
    (views.select, ["select.int"]),
    (views.gather, ["index.Tensor"]),
    (pointwise.numbers(operator.add), ["add.Tensor", "add.Scalar"]),
    (pointwise.numbers(operator.sub), ["sub.Tensor", "sub.Scalar"]),
    (pointwise.numbers(lambda a, b: b - a), ["rsub.Tensor", "rsub.Scalar"]),
    (pointwise.numbers(operator.mul), ["mul.Tensor", "mul.Scalar"]),
    (pointwise.numbers(operator.truediv), ["div.Tensor", "div.Scalar"]),
    (pointwise.numbers(operator.neg), ["neg"]),
    (pointwise.numbers(sympy.sqrt), ["sqrt"]),
    (pointwise.numbers(operator.pow), ["pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"]),
    (pointwise.compare(sympy.Le), ["le.Tensor", "le.Scalar", "less_equal.Tensor"]),
    (pointwise.compare(sympy.Lt), ["lt.Tensor", "lt.Scalar", "less.Tensor"]),
    (pointwise.compare(sympy.Ge), ["ge.Tensor", "ge.Scalar", "greater_equal.Tensor"]),
    (pointwise.compare(sympy.Gt), ["gt.Tensor", "gt.Scalar", "greater.Tensor"]),
    (pointwise.compare(sympy.Eq), ["eq.Tensor", "eq.Scalar"]),
    (pointwise.compare(sympy.Ne), ["ne.Tensor", "ne.Scalar", "not_equal.Tensor"]),
    (pointwise.logic(sympy.And), ["logical_and", "bitwise_and.Tensor", "__and__.Tensor"]),
    (pointwise.logic(sympy.Or), ["logical_or", "bitwise_or.Tensor", "__or__.Tensor"]),
    (pointwise.logic(sympy.Not), ["logical_not", "bitwise_not"]),
    (pointwise.where, ["where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"]),
    (pointwise.masked_fill, ["masked_fill.Scalar", "masked_fill.Tensor"]),
    (pointwise.masked_put, ["index_put"]),
    (creation.triangular(sympy.Le), ["tril"]),
    (creation.triangular(sympy.Ge), ["triu"]),
    (pointwise.absolute, ["abs", "absolute"]),
    (pointwise.log, ["log"]),
    (pointwise.bounded(1, "min", 2, "max"), ["clamp", "clamp.Tensor", "clip"]),
    (pointwise.bounded(1, "min", None, ""), ["clamp_min"]),
    (pointwise.bounded(None, "", 1, "max"), ["clamp_max"]),
    (pointwise.bounded(1, "other", None, ""), ["maximum", "max.other"]),
    (pointwise.bounded(None, "", 1, "other"), ["minimum", "min.other"]),
    (
        pointwise.floor_divide,
        ["floor_divide", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode"],
    ),
    (views.padded, ["pad", "constant_pad_nd"]),
    (views.joined, ["cat"]),
    (creation.cumsum, ["cumsum"]),
    (creation.diff, ["diff"]),
]
# In place, where `aliases.made_in_place` says that nobody read what was there before; and where
# symbolic/in_place.py says who did.
_IN_PLACE: list[tuple[Rule, Sequence[str]]] = [
    (creation.fill(1, "value"), ["fill_.Scalar", "fill_.Tensor"]),
    (creation.filled_with(0), ["zero_"]),
    (pointwise.copied, ["copy_"]),
    (pointwise.numbers(operator.add), ["add_.Tensor"]),
    (pointwise.numbers(operator.sub), ["sub_.Tensor"]),
    (pointwise.numbers(operator.mul), ["mul_.Tensor"]),
    (pointwise.numbers(operator.truediv), ["div_.Tensor"]),
    (pointwise.logic(sympy.And), ["logical_and_", "bitwise_and_.Tensor", "__iand__.Tensor"]),
    (pointwise.logic(sympy.Or), ["logical_or_", "bitwise_or_.Tensor", "__ior__.Tensor"]),
    (pointwise.logic(sympy.Not), ["logical_not_", "bitwise_not_"]),
    (pointwise.masked_fill, ["masked_fill_.Scalar", "masked_fill_.Tensor"]),
    (pointwise.masked_put, ["index_put_"]),
    (creation.triangular(sympy.Le), ["tril_"]),
    (creation.triangular(sympy.Ge), ["triu_"]),
]


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


_VIEW_RULES = (
    views.same,
    views.unsqueeze,
    views.permute,
    views.reshape,
    views.sliced,
    views.select,
)
VIEWS = {_overload(n) for rule, names in _OPERATORS if rule in _VIEW_RULES for n in names}
RULES: dict[Any, Rule] = dict.fromkeys(CASTS, pointwise.cast) | {
    _overload(n): rule for rule, names in (*_OPERATORS, *_IN_PLACE) for n in names
}
