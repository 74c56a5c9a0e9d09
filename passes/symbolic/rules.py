"""What each operator's value at an index is, in terms of its arguments' values.

A rule is `(reader, node, index) -> expression`, or None where the value is not known: the node is
then a leaf. The reader rounds a rule's result to the node's dtype, so that rules state mathematics.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, axis, dtype, permutation, shape
from moonfx.passes.symbolic.expressions import (
    Expr,
    choose,
    constant,
    divided,
    is_boolean,
    loads,
    rest_of,
    to_bool,
    to_number,
)

if TYPE_CHECKING:
    from moonfx.passes.symbolic.reader import Reader

aten = torch.ops.aten
Index = tuple[Expr, ...]
Rule = Callable[["Reader", fx.Node, Index], Expr | None]


# --- values ---------------------------------------------------------------------------------------


def _same(reader: "Reader", node: fx.Node, index: Index) -> Expr:
    return reader.broadcast(node.args[0], index)


def _cast(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value, old, new = reader.read(source, index), dtype(source), dtype(node)
    if old == new or new == torch.bool or is_boolean(value) or not loads(value):
        return value
    # Unknown values survive only a cast to a dtype that holds them all.
    assert old is not None
    assert new is not None
    widens = torch.promote_types(old, new) == new
    exact = old.is_floating_point or new not in (torch.float16, torch.bfloat16)
    return value if widens and exact else None


def _fill(position: int, name: str = "fill_value") -> Rule:
    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr:
        return reader.read(argument(node, position, name), ())

    return rule


def _filled_with(value: int) -> Rule:
    return lambda reader, node, index: constant(value)


def _arange(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    name = node.target._overloadname  # type: ignore[union-attr]
    start = argument(node, 0, "start") if name != "default" else 0
    step = argument(node, 2, "step", 1) if name == "start_step" else 1
    start, step = reader.read(start, ()), reader.read(step, ())
    if not (start.is_integer and step.is_integer):
        return None
    return start + index[0] * step


def _cumsum(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """Only of a constant: the sum of k + 1 equal terms."""
    dim = axis(node, argument(node, 1, "dim"))
    term = to_number(reader.read(node.args[0], index))
    return term * (index[dim] + 1) if term.is_Integer else None


def _diff(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """diff(x, prepend=p) with one prepended element."""
    dim = axis(node, argument(node, 2, "dim", -1))
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or append is not None or not isinstance(prepend, fx.Node):
        return None
    if shape(prepend)[dim] != 1 or dtype(node) == torch.bool:
        return None

    def at(source: Any, position: Expr) -> Expr:
        return to_number(reader.broadcast(source, (*index[:dim], position, *index[dim + 1 :])))

    zero, here = sympy.Integer(0), index[dim]
    first = sympy.expand(at(node.args[0], zero) - at(prepend, zero))
    rest = sympy.expand(at(node.args[0], here) - at(node.args[0], here - 1))
    return choose(sympy.Eq(here, 0), first, rest)


# --- views ----------------------------------------------------------------------------------------


def _unsqueeze(reader: "Reader", node: fx.Node, index: Index) -> Expr:
    dim = axis(node, argument(node, 1, "dim"))
    return reader.read(node.args[0], index[:dim] + index[dim + 1 :])


def _permute(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    order = permutation(node)
    if order is None:
        return None
    source: list[Expr] = [0] * len(index)
    for out_dim, in_dim in enumerate(order):
        source[in_dim] = index[out_dim]
    return reader.read(node.args[0], source)


def _reshape(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    sizes_in, sizes_out = shape(source), shape(node)
    groups = reshape_groups(sizes_in, sizes_out)
    if groups is None:
        return None
    result: list[Expr] = [sympy.Integer(0)] * len(sizes_in)
    for ins, outs in groups:
        flat: Expr = sympy.Integer(0)
        for dim in outs:
            flat = flat * sizes_out[dim] + (0 if sizes_out[dim] == 1 else index[dim])
        wide = [d for d in ins if sizes_in[d] != 1]
        for dim in reversed(wide[1:]):
            flat, result[dim] = divided(flat, sizes_in[dim])
        if wide:
            result[wide[0]] = flat
    return reader.read(source, result)


def reshape_groups(
    before: Sequence[Expr], after: Sequence[Expr]
) -> list[tuple[list[int], list[int]]] | None:
    """Dims of `before` and `after` cut into shortest runs of equal product, or None if unproved."""
    if 0 in before or 0 in after:
        return None
    groups, i, o = [], 0, 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        have: Expr = sympy.Integer(1)
        want: Expr = sympy.Integer(1)
        if i < len(before):
            have, i = before[i], i + 1
            ins.append(i - 1)
        if o < len(after):
            want, o = after[o], o + 1
            outs.append(o - 1)
        while sympy.expand(have - want) != 0:
            ratio = sympy.simplify(want / have)
            grow_in = ratio > 1 if ratio.is_number else ratio.is_integer
            if grow_in and i < len(before):
                have, i = have * before[i], i + 1
                ins.append(i - 1)
            elif o < len(after):
                want, o = want * after[o], o + 1
                outs.append(o - 1)
            elif i < len(before):
                have, i = have * before[i], i + 1
                ins.append(i - 1)
            else:
                return None
        groups.append((ins, outs))
    return groups


def _slice(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = axis(node, argument(node, 1, "dim", 0))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    begin = _position(reader, 0 if start is None else start, shape(source)[dim])
    if begin is None:
        return None
    moved = begin + index[dim] * reader.read(step, ())
    return reader.read(source, (*index[:dim], moved, *index[dim + 1 :]))


def _select(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = axis(source, argument(node, 1, "dim"))
    at = _position(reader, argument(node, 2, "index"), shape(source)[dim])
    return None if at is None else reader.read(source, (*index[:dim], at, *index[dim:]))


def _position(reader: "Reader", given: object, size: Expr) -> Expr | None:
    """An index as Python counts it, from the front; None if its sign is not known.

    A start before the front is None too: slice() moves it to 0, which no formula here says.
    """
    at = reader.read(given, ())
    if at.is_negative:
        at = size + at
    return at if at.is_nonnegative else None


def _gather(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """x[a, b, ...] and x[:, a]: adjacent index tensors, the other dims whole."""
    source, given = node.args[0], argument(node, 1, "indices")
    assert isinstance(source, fx.Node)
    given = list(given) + [None] * (len(shape(source)) - len(given))
    dims = [d for d, g in enumerate(given) if g is not None]
    kinds = {dtype(given[d]) for d in dims}
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    if not adjacent or kinds & {torch.bool, torch.uint8}:  # uint8 counts as a mask
        return None
    width = max(len(shape(given[d])) for d in dims)
    inner = index[dims[0] : dims[0] + width]
    at = [to_number(reader.broadcast(given[d], inner)) for d in dims]
    if any(x.is_nonnegative is not True for x in at):
        return None
    return reader.read(source, (*index[: dims[0]], *at, *index[dims[0] + width :]))


# --- elementwise ----------------------------------------------------------------------------------


def _numbers(function: Callable[..., Expr]) -> Rule:
    """Elementwise arithmetic; alpha of add and sub must be 1."""

    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            return None
        return function(*(to_number(reader.broadcast(a, index)) for a in node.args))

    return rule


def _compare(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
        a, b = (reader.broadcast(x, index) for x in node.args)
        if is_boolean(a) and is_boolean(b):
            if relation in (sympy.Eq, sympy.Ne):
                same = sympy.Or(sympy.And(a, b), sympy.And(sympy.Not(a), sympy.Not(b)))
                return same if relation is sympy.Eq else sympy.Not(same)
            return None
        a, b = to_number(a), to_number(b)
        if a.has(sympy.nan) or b.has(sympy.nan):
            return None
        whole = all(x.is_integer for x in (*loads(a), *loads(b)))
        if not (a.is_number or b.is_number or whole):
            return None  # NaN is not equal to itself
        for x, y, flip in ((a, b, False), (b, a, True)):
            if isinstance(x, sympy.Piecewise) and y.is_number:
                yes, no, condition = x.args[0][0], rest_of(x), x.args[0][1]
                sides = [(y, s) if flip else (s, y) for s in (yes, no)]
                return choose(condition, relation(*sides[0]), relation(*sides[1]))
        return relation(a, b)

    return rule


def _logic(function: Callable[..., Expr]) -> Rule:
    """Logical operators; bitwise ones of booleans, not of integers."""

    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
        if dtype(node) != torch.bool:
            return None
        return function(*(to_bool(reader.broadcast(a, index)) for a in node.args))

    return rule


def _where(reader: "Reader", node: fx.Node, index: Index) -> Expr:
    condition, yes, no = (reader.broadcast(a, index) for a in node.args)
    return _choose_for(node, to_bool(condition), yes, no)


def _masked_fill(reader: "Reader", node: fx.Node, index: Index) -> Expr:
    x, mask, value = (reader.broadcast(a, index) for a in node.args)
    return _choose_for(node, to_bool(mask), value, x)


def _choose_for(node: fx.Node, condition: Expr, yes: Expr, no: Expr) -> Expr:
    """where(), as the node's dtype promotes: True beside 5 is 1."""
    if dtype(node) != torch.bool:
        yes, no = to_number(yes), to_number(no)
    return choose(condition, yes, no)


def _triangular(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr:
        diagonal = reader.read(argument(node, 1, "diagonal", 0), ())
        inside = relation(index[-1] - index[-2], diagonal)
        value = reader.read(node.args[0], index)
        return _choose_for(node, inside, value, sympy.false if is_boolean(value) else sympy.S.Zero)

    return rule


def _bounded(lower: int | None, low_name: str, upper: int | None, high_name: str) -> Rule:
    """clamp and its relatives, of numbers that are known but for their indices."""

    def rule(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
        value = to_number(reader.broadcast(node.args[0], index))
        low = None if lower is None else argument(node, lower, low_name)
        high = None if upper is None else argument(node, upper, high_name)
        if loads(value):
            return None  # NaN is neither above nor below
        if low is not None:
            value = _extreme(sympy.Max, sympy.Ge, value, to_number(reader.broadcast(low, index)))
        if high is not None:
            value = _extreme(sympy.Min, sympy.Le, value, to_number(reader.broadcast(high, index)))
        return value

    return rule


def _extreme(function: Any, first: Any, a: Expr, b: Expr) -> Expr:
    """Max or Min; of choices a choice, so that conditions stay in sight."""
    if a.has(sympy.Piecewise) or b.has(sympy.Piecewise):
        return sympy.piecewise_fold(function(a, b))
    return function(a, b)


def _absolute(reader: "Reader", node: fx.Node, index: Index) -> Expr:
    value = to_number(reader.broadcast(node.args[0], index))
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((sympy.Abs(v), c) for v, c in value.args))
    return sympy.Abs(value)


def _log(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """Of 0 and 1 alone: a mask that is multiplied, made one that is added."""
    value = to_number(reader.broadcast(node.args[0], index))
    known = {sympy.S.Zero: -sympy.oo, sympy.S.One: sympy.S.Zero}
    if isinstance(value, sympy.Piecewise) and all(v in known for v, _ in value.args):
        return sympy.Piecewise(*((known[v], c) for v, c in value.args))
    return known.get(value)


def _floor_divide(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """Of integers, by a positive constant: floor, as Python's //."""
    if node.kwargs.get("rounding_mode", "floor") != "floor":
        return None
    value, divisor = (to_number(reader.broadcast(x, index)) for x in node.args[:2])
    if not (value.is_integer and divisor.is_Integer and divisor > 0):
        return None
    return sympy.floor(value / divisor)


def _padded(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """Padding by nothing, as a library writes it that pads to a size it has already."""
    return reader.read(node.args[0], index) if not any(argument(node, 1, "pad")) else None


def _joined(reader: "Reader", node: fx.Node, index: Index) -> Expr | None:
    """cat, where the index says which part it is in: the first, or none of what is empty."""
    parts, dim = node.args[0], axis(node, argument(node, 1, "dim", 0))
    assert isinstance(parts, list | tuple)
    filled = [p for p in parts if isinstance(p, fx.Node) and 0 not in shape(p)]
    return reader.read(filled[0], index) if len(filled) == 1 and dim >= 0 else None


_CASTS = ("to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy", "type_as")
_OPERATORS: list[tuple[Rule, Sequence[str]]] = [
    (_same, ["alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy", "lift_fresh"]),
    (_cast, _CASTS),
    (_arange, ["arange", "arange.start", "arange.start_step"]),
    (_fill(1), ["full", "full_like"]),
    (_fill(2), ["new_full"]),
    (_fill(0, "s"), ["scalar_tensor"]),
    (_filled_with(0), ["zeros", "zeros_like", "new_zeros"]),
    (_filled_with(1), ["ones", "ones_like", "new_ones"]),
    (_unsqueeze, ["unsqueeze"]),
    (_same, ["expand", "expand_as", "broadcast_to"]),
    (_permute, ["permute", "transpose.int", "swapaxes", "swapdims", "movedim.int"]),
    (_permute, ["t", "mT", "numpy_T"]),
    (_reshape, ["view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"]),
    (_reshape, ["squeeze", "squeeze.dim", "squeeze.dims"]),
    (_slice, ["slice.Tensor"]),
    (_select, ["select.int"]),
    (_gather, ["index.Tensor"]),
    (_numbers(operator.add), ["add.Tensor", "add.Scalar"]),
    (_numbers(operator.sub), ["sub.Tensor", "sub.Scalar"]),
    (_numbers(lambda a, b: b - a), ["rsub.Tensor", "rsub.Scalar"]),
    (_numbers(operator.mul), ["mul.Tensor", "mul.Scalar"]),
    (_numbers(operator.truediv), ["div.Tensor", "div.Scalar"]),
    (_numbers(operator.neg), ["neg"]),
    (_numbers(sympy.sqrt), ["sqrt"]),
    (_numbers(operator.pow), ["pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"]),
    (_compare(sympy.Le), ["le.Tensor", "le.Scalar", "less_equal.Tensor"]),
    (_compare(sympy.Lt), ["lt.Tensor", "lt.Scalar", "less.Tensor"]),
    (_compare(sympy.Ge), ["ge.Tensor", "ge.Scalar", "greater_equal.Tensor"]),
    (_compare(sympy.Gt), ["gt.Tensor", "gt.Scalar", "greater.Tensor"]),
    (_compare(sympy.Eq), ["eq.Tensor", "eq.Scalar"]),
    (_compare(sympy.Ne), ["ne.Tensor", "ne.Scalar", "not_equal.Tensor"]),
    (_logic(sympy.And), ["logical_and", "bitwise_and.Tensor", "__and__.Tensor"]),
    (_logic(sympy.Or), ["logical_or", "bitwise_or.Tensor", "__or__.Tensor"]),
    (_logic(sympy.Not), ["logical_not", "bitwise_not"]),
    (_where, ["where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"]),
    (_masked_fill, ["masked_fill.Scalar", "masked_fill.Tensor"]),
    (_triangular(sympy.Le), ["tril"]),
    (_triangular(sympy.Ge), ["triu"]),
    (_absolute, ["abs", "absolute"]),
    (_log, ["log"]),
    (_bounded(1, "min", 2, "max"), ["clamp", "clamp.Tensor", "clip"]),
    (_bounded(1, "min", None, ""), ["clamp_min"]),
    (_bounded(None, "", 1, "max"), ["clamp_max"]),
    (_bounded(1, "other", None, ""), ["maximum", "max.other"]),
    (_bounded(None, "", 1, "other"), ["minimum", "min.other"]),
    (_floor_divide, ["floor_divide", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode"]),
    (_padded, ["pad", "constant_pad_nd"]),
    (_joined, ["cat"]),
    (_cumsum, ["cumsum"]),
    (_diff, ["diff"]),
]


# In place, where `mutation.made_in_place` says that nobody read what was there before.
_IN_PLACE: list[tuple[Rule, Sequence[str]]] = [
    (_fill(1, "value"), ["fill_.Scalar", "fill_.Tensor"]),
    (_filled_with(0), ["zero_"]),
    (_numbers(operator.add), ["add_.Tensor"]),
    (_numbers(operator.sub), ["sub_.Tensor"]),
    (_numbers(operator.mul), ["mul_.Tensor"]),
    (_numbers(operator.truediv), ["div_.Tensor"]),
    (_logic(sympy.And), ["logical_and_", "bitwise_and_.Tensor", "__iand__.Tensor"]),
    (_logic(sympy.Or), ["logical_or_", "bitwise_or_.Tensor", "__ior__.Tensor"]),
    (_logic(sympy.Not), ["logical_not_", "bitwise_not_"]),
    (_masked_fill, ["masked_fill_.Scalar", "masked_fill_.Tensor"]),
    (_triangular(sympy.Le), ["tril_"]),
    (_triangular(sympy.Ge), ["triu_"]),
]


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


CASTS = {_overload(name) for name in _CASTS}
_VIEW_RULES = (_same, _unsqueeze, _permute, _reshape, _slice, _select)
VIEWS = {_overload(n) for rule, names in _OPERATORS if rule in _VIEW_RULES for n in names}
RULES: dict[Any, Rule] = {
    _overload(n): rule for rule, names in (*_OPERATORS, *_IN_PLACE) for n in names
}
