"""Reads a tensor of the graph as a function of its indices, for every shape.

    mask = arange(N)[None, :] <= arange(N)[:, None]        read at (i, j) gives    j <= i

`Reader.read(node, index)` pulls an index expression back through views, broadcasts, gathers,
comparisons and arithmetic to the leaves. Integers, floats and booleans are sympy expressions; a
leaf whose values are unknown becomes `load_<name>(index...)`, so nothing about it can be proved by
accident. An operation that is not in the table is a leaf as well. Symbols of sizes are the graph's
own, so that what is proved here holds for every shape the graph will run with.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.capture import buffer_value, expression

aten = torch.ops.aten
Expr = Any  # sympy.Expr or sympy.logic.boolalg.Boolean
Index = tuple[Expr, ...]

# Below this an additive mask value is a mask: exp(-1e4 + score) is zero in float32 for every score
# that attention can have (|score| < 9e3).
MASKED_BELOW = -1e4


def load_symbol(name: str) -> Any:
    """The unknown tensor `name` as an integer-valued function of its index."""
    return sympy.Function(f"load_{name}", integer=True)


def is_load(expr: Expr) -> bool:
    return getattr(getattr(expr, "func", None), "__name__", "").startswith("load_")


def is_boolean(expr: Expr) -> bool:
    """Whether an expression is a truth value. (To sympy every Symbol is one too.)"""
    return isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol)


def to_bool(expr: Expr) -> Expr:
    if is_boolean(expr):
        return expr
    if isinstance(expr, sympy.Piecewise):
        return choose(expr.args[0][1], to_bool(expr.args[0][0]), to_bool(_rest(expr)))
    return sympy.Ne(expr, 0)


def to_number(expr: Expr) -> Expr:
    if is_boolean(expr):
        return choose(expr, sympy.Integer(1), sympy.Integer(0))
    return expr


def _rest(expr: sympy.Piecewise) -> Expr:
    rest = expr.args[1:]
    return rest[0][0] if rest[0][1] == True else sympy.Piecewise(*rest)  # noqa: E712


def choose(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """where(condition, yes, no)."""
    if condition == True:  # noqa: E712
        return yes
    if condition == False:  # noqa: E712
        return no
    if yes == no:
        return yes
    if is_boolean(yes) or is_boolean(no):
        yes, no = to_bool(yes), to_bool(no)
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.Piecewise((yes, condition), (no, True))


def constant(value: object) -> Expr:
    """A Python or tensor scalar as an expression."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    if isinstance(value, float) and value == int(value):
        return sympy.Integer(int(value))
    return sympy.sympify(value)


class Reader:
    """Reads nodes at index expressions.

    Args:
        outer: maps a placeholder of a nested body to the node it is called with, or None.
        mutated: whether some operator of the graph writes into the node's memory. Its values then
            depend on when it is read, so it is a leaf.
    """

    def __init__(
        self, outer: Callable[[fx.Node], fx.Node | None], mutated: Callable[[fx.Node], bool]
    ) -> None:
        self.outer = outer
        self.mutated = mutated
        self.leaves: dict[str, fx.Node] = {}
        self.constants: dict[fx.Node, tuple[float, float]] = {}
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}

    def read(self, node: object, index: Sequence[Expr]) -> Expr:
        """The value of `node` at `index` (one expression per dimension)."""
        if not isinstance(node, fx.Node):
            return constant(node)
        index = tuple(sympy.sympify(x) for x in index)
        if (node, index) not in self._memo:
            self._memo[node, index] = self._read(node, index)
        return self._memo[node, index]

    def broadcast(self, node: object, index: Sequence[Expr]) -> Expr:
        """The value of `node` broadcast to an index of equal or higher rank."""
        if not isinstance(node, fx.Node):
            return constant(node)
        sizes = shape(node)
        aligned = tuple(index)[len(index) - len(sizes) :]
        return self.read(node, [0 if n == 1 else x for n, x in zip(sizes, aligned, strict=True)])

    def load(self, node: fx.Node, index: Index) -> Expr:
        """`node` as an unknown tensor."""
        self.leaves[node.name] = node
        value = load_symbol(node.name)(*index)
        return sympy.Ne(value, 0) if dtype(node) == torch.bool else value

    def _read(self, node: fx.Node, index: Index) -> Expr:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | int | float):
            return expression(value)
        if not isinstance(value, torch.Tensor) or self.mutated(node):
            return self.load(node, index)
        if node.op == "placeholder" and (source := self.outer(node)) is not None:
            return self.read(source, index)
        if node.op in ("placeholder", "get_attr"):
            return self._read_constant(node, index)
        rule = RULES.get(node.target)
        result = rule(self, node, index) if rule is not None else None
        return self.load(node, index) if result is None else result

    def _read_constant(self, node: fx.Node, index: Index) -> Expr:
        """A buffer or a constant tensor: one repeated value, or a triangle."""
        value = buffer_value(node)
        known = None if value is None else summary(value)
        if known is None:
            return self.load(node, index)
        self.constants[node] = known
        on_and_below, above = (constant(x) for x in known)
        if on_and_below == above:
            return on_and_below
        return choose(sympy.Le(index[-1], index[-2]), on_and_below, above)


def summary(value: torch.Tensor) -> tuple[float, float] | None:
    """(on and below, above the diagonal) of a tensor that holds just these values, else None."""
    if value.numel() == 0 or value.dtype.is_complex:
        return None
    first = value.flatten()[0]
    if bool((value == first).all()):
        return first.item(), first.item()
    return _triangle(value)


def _triangle(value: torch.Tensor) -> tuple[float, float] | None:
    """(on and below, above the diagonal) if the last two dims hold just these two values."""
    if value.ndim < 2 or min(value.shape[-2:]) < 2:
        return None
    flat = value.reshape(-1, *value.shape[-2:])
    lower = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    below, above = flat[0, 0, 0], flat[0, 0, -1]
    if bool((flat == torch.where(lower, below, above)).all()):
        return below.item(), above.item()
    return None


def shape(node: fx.Node) -> list[Expr]:
    value = node.meta["val"]
    return [expression(n) for n in value.shape] if isinstance(value, torch.Tensor) else []


def dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name, as the operator's schema has it."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def axis(node: fx.Node, dim: int) -> int:
    return dim % max(len(shape(node)), 1)


# --- rules: (reader, node, index) -> expression, or None for "a leaf" ------------------------------

Rule = Callable[[Reader, fx.Node, Index], Expr | None]


def _same(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return reader.broadcast(node.args[0], index)


def _cast(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value, old, new = reader.read(source, index), dtype(source), dtype(node)
    if new == torch.bool:
        return to_bool(value)
    if old is None or new is None or (old.is_floating_point and not new.is_floating_point):
        return None
    return to_number(value)


def _fill(argument_index: int, name: str = "fill_value") -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr:
        value = reader.read(argument(node, argument_index, name), ())
        return to_bool(value) if dtype(node) == torch.bool else value

    return rule


def _filled_with(value: int) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr:
        return constant(bool(value) if dtype(node) == torch.bool else value)

    return rule


def _arange(reader: Reader, node: fx.Node, index: Index) -> Expr:
    args = [reader.read(a, ()) for a in node.args]
    start = args[0] if len(args) > 1 else sympy.Integer(0)
    step = args[2] if len(args) > 2 else sympy.Integer(1)
    return start + index[0] * step


def _unsqueeze(reader: Reader, node: fx.Node, index: Index) -> Expr:
    dim = axis(node, argument(node, 1, "dim"))
    return reader.read(node.args[0], index[:dim] + index[dim + 1 :])


def _expand(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return reader.broadcast(node.args[0], index)


def _permutation(node: fx.Node) -> list[int] | None:
    """Output dim -> input dim of a transpose, permute or t node."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape(source))
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in argument(node, 1, "dims")]
    if node.target is aten.transpose.int:
        a, b = axis(node, argument(node, 1, "dim0")), axis(node, argument(node, 2, "dim1"))
    elif node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default) and rank >= 2:
        a, b = rank - 2, rank - 1
        if node.target is aten.numpy_T.default and rank > 2:
            return order[::-1]
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def permutation(node: fx.Node) -> list[int] | None:
    """Output dim -> input dim, or None if the node permutes nothing."""
    is_call = node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node)
    return _permutation(node) if is_call else None


def _permute(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    order = _permutation(node)
    if order is None:
        return None
    source: list[Expr] = [0] * len(index)
    for out_dim, in_dim in enumerate(order):
        source[in_dim] = index[out_dim]
    return reader.read(node.args[0], source)


def _reshape(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    groups = reshape_groups(shape(source), shape(node))
    if groups is None:
        return None
    sizes_in, sizes_out = shape(source), shape(node)
    result: list[Expr] = [sympy.Integer(0)] * len(sizes_in)
    for ins, outs in groups:
        flat: Expr = sympy.Integer(0)
        for dim in outs:
            flat = flat * sizes_out[dim] + (0 if sizes_out[dim] == 1 else index[dim])
        wide = [d for d in ins if sizes_in[d] != 1]
        for dim in reversed(wide[1:]):
            result[dim] = sympy.Mod(flat, sizes_in[dim])
            flat = sympy.floor(flat / sizes_in[dim])
        if wide:
            result[wide[0]] = flat
    return reader.read(source, result)


def reshape_groups(
    before: Sequence[Expr], after: Sequence[Expr]
) -> list[tuple[list[int], list[int]]] | None:
    """Dims of `before` and `after` cut into shortest runs of equal product, or None if unproved."""
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
            grow_in = ratio.is_number and ratio > 1 or (not ratio.is_number and ratio.is_integer)
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


def _slice(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    dim = axis(node, argument(node, 1, "dim", 0))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    begin = sympy.Integer(0) if start is None else reader.read(start, ())
    if begin.is_negative:
        begin = shape(node.args[0])[dim] + begin  # type: ignore[arg-type]
    if begin.is_nonnegative is not True:
        return None
    moved = begin + index[dim] * reader.read(step, ())
    return reader.read(node.args[0], (*index[:dim], moved, *index[dim + 1 :]))


def _select(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = axis(source, argument(node, 1, "dim"))
    at = reader.read(argument(node, 2, "index"), ())
    if at.is_negative:
        at = shape(source)[dim] + at
    if at.is_nonnegative is not True:
        return None
    return reader.read(source, (*index[:dim], at, *index[dim:]))


def _squeeze(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    return _reshape(reader, node, index)


def _gather(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """x[a, b, ...] and x[:, a]: adjacent index tensors, the other dims whole."""
    source, given = node.args[0], argument(node, 1, "indices")
    assert isinstance(source, fx.Node)
    given = list(given) + [None] * (len(shape(source)) - len(given))
    dims = [d for d, g in enumerate(given) if g is not None]
    if dims != list(range(dims[0], dims[-1] + 1)) or any(dtype(given[d]) == torch.bool for d in dims):
        return None
    width = max(len(shape(given[d])) for d in dims)
    inner = index[dims[0] : dims[0] + width]
    at = [reader.broadcast(given[d], inner) for d in dims]
    if any(to_number(x).is_nonnegative is not True for x in at):
        return None
    return reader.read(source, (*index[: dims[0]], *at, *index[dims[0] + width :]))


def _numbers(function: Callable[..., Expr]) -> Rule:
    """Elementwise arithmetic; alpha of add and sub must be 1."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            return None
        return function(*(to_number(reader.broadcast(a, index)) for a in node.args))

    return rule


def _compare(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        a, b = (reader.broadcast(x, index) for x in node.args)
        if is_boolean(a) and is_boolean(b):
            if relation in (sympy.Eq, sympy.Ne):
                same = sympy.Or(sympy.And(a, b), sympy.And(sympy.Not(a), sympy.Not(b)))
                return same if relation is sympy.Eq else sympy.Not(same)
            return None
        a, b = to_number(a), to_number(b)
        for x, y, flip in ((a, b, False), (b, a, True)):
            if isinstance(x, sympy.Piecewise) and y.is_number:
                yes, no, condition = x.args[0][0], _rest(x), x.args[0][1]
                sides = [(y, s) if flip else (s, y) for s in (yes, no)]
                return choose(condition, relation(*sides[0]), relation(*sides[1]))
        return relation(a, b)

    return rule


def _logic(function: Callable[..., Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        if dtype(node) != torch.bool:
            return None
        return function(*(to_bool(reader.broadcast(a, index)) for a in node.args))

    return rule


def _where(reader: Reader, node: fx.Node, index: Index) -> Expr:
    condition, yes, no = (reader.broadcast(a, index) for a in node.args)
    return choose(to_bool(condition), yes, no)


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> Expr:
    x, mask, value = (reader.broadcast(a, index) for a in node.args)
    return choose(to_bool(mask), value, x)


def _triangular(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr:
        diagonal = reader.read(argument(node, 1, "diagonal", 0), ())
        inside = relation(index[-1] - index[-2], diagonal)
        value = reader.read(node.args[0], index)
        zero = sympy.false if dtype(node) == torch.bool else sympy.Integer(0)
        return choose(inside, value, zero)

    return rule


def _cumsum(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """Only of a constant: the sum of k + 1 equal terms."""
    dim = axis(node, argument(node, 1, "dim"))
    term = to_number(reader.read(node.args[0], index))
    return term * (index[dim] + 1) if term.is_number else None


def _diff(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """diff(x, prepend=p) with one prepended element."""
    dim = axis(node, argument(node, 2, "dim", -1))
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or append is not None or not isinstance(prepend, fx.Node):
        return None
    if shape(prepend)[dim] != 1:
        return None

    def at(source: Any, position: Expr) -> Expr:
        return to_number(reader.broadcast(source, (*index[:dim], position, *index[dim + 1 :])))

    zero, here = sympy.Integer(0), index[dim]
    first = sympy.expand(at(node.args[0], zero) - at(prepend, zero))
    rest = sympy.expand(at(node.args[0], here) - at(node.args[0], here - 1))
    return choose(sympy.Eq(here, 0), first, rest)


def _divide(a: Expr, b: Expr) -> Expr:
    return a / b


_OPERATORS: list[tuple[Rule, Sequence[str]]] = [
    (_same, ["alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy", "lift_fresh"]),
    (_cast, ["to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy", "type_as"]),
    (_arange, ["arange", "arange.start", "arange.start_step"]),
    (_fill(1), ["full", "full_like"]),
    (_fill(2), ["new_full"]),
    (_fill(0, "s"), ["scalar_tensor"]),
    (_filled_with(0), ["zeros", "zeros_like", "new_zeros"]),
    (_filled_with(1), ["ones", "ones_like", "new_ones"]),
    (_unsqueeze, ["unsqueeze"]),
    (_expand, ["expand", "expand_as", "broadcast_to"]),
    (_permute, ["permute", "transpose.int", "t", "mT", "numpy_T"]),
    (_reshape, ["view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"]),
    (_squeeze, ["squeeze", "squeeze.dim", "squeeze.dims"]),
    (_slice, ["slice.Tensor"]),
    (_select, ["select.int"]),
    (_gather, ["index.Tensor"]),
    (_numbers(operator.add), ["add.Tensor", "add.Scalar"]),
    (_numbers(operator.sub), ["sub.Tensor", "sub.Scalar"]),
    (_numbers(lambda a, b: b - a), ["rsub.Tensor", "rsub.Scalar"]),
    (_numbers(operator.mul), ["mul.Tensor", "mul.Scalar"]),
    (_numbers(_divide), ["div.Tensor", "div.Scalar"]),
    (_numbers(operator.neg), ["neg"]),
    (_numbers(sympy.sqrt), ["sqrt"]),
    (_numbers(lambda a, b: a**b), ["pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"]),
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
    (_cumsum, ["cumsum"]),
    (_diff, ["diff"]),
]


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


RULES: dict[Any, Rule] = {_overload(n): rule for rule, names in _OPERATORS for n in names}
