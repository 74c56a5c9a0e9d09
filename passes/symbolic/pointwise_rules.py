"""Rules for operators that compute element by element."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, dtype, shape
from moonfx.passes.symbolic.expressions import (
    Expr,
    Index,
    Reader,
    Rule,
    choose,
    is_boolean,
    loads,
    rest_of,
    to_bool,
    to_number,
)


def cast(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    return _held(reader.read(node.args[0], index), node.args[0], node)


def copied(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """x.copy_(y)"""
    return _held(reader.broadcast(node.args[1], index), node.args[1], node)


def _held(value: Expr, source: object, node: fx.Node) -> Expr | None:
    """A value of a tensor as a node of another dtype holds it."""
    assert isinstance(source, fx.Node)
    old, new = dtype(source), dtype(node)
    if old == new or new == torch.bool or is_boolean(value) or not loads(value):
        return value
    # Unknown values survive only a cast to a dtype that holds them all.
    assert old is not None
    assert new is not None
    widens = torch.promote_types(old, new) == new
    exact = old.is_floating_point or new not in (torch.float16, torch.bfloat16)
    return value if widens and exact else None


def numbers(function: Callable[..., Expr]) -> Rule:
    """Elementwise arithmetic; alpha of add and sub must be 1."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
            return None
        return function(*(to_number(reader.broadcast(a, index)) for a in node.args))

    return rule


def compare(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
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


def logic(function: Callable[..., Expr]) -> Rule:
    """Logical operators; bitwise ones of booleans, not of integers."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        if dtype(node) != torch.bool:
            return None
        return function(*(to_bool(reader.broadcast(a, index)) for a in node.args))

    return rule


def where(reader: Reader, node: fx.Node, index: Index) -> Expr:
    condition, yes, no = (reader.broadcast(a, index) for a in node.args)
    return choose_for(node, to_bool(condition), yes, no)


def masked_fill(reader: Reader, node: fx.Node, index: Index) -> Expr:
    x, mask, value = (reader.broadcast(a, index) for a in node.args)
    return choose_for(node, to_bool(mask), value, x)


def masked_put(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """x[mask] = value, with a mask of x's shape and one value."""
    if len(node.all_input_nodes) != 3 or argument(node, 3, "accumulate", False):
        return None
    x, mask, value = node.all_input_nodes
    if list(node.args[:3]) != [x, [mask], value] or any(n != 1 for n in shape(value)):
        return None
    if dtype(mask) != torch.bool or shape(mask) != shape(x):
        return None
    chosen = reader.broadcast(value, index)
    return choose_for(node, to_bool(reader.read(mask, index)), chosen, reader.read(x, index))


def choose_for(node: fx.Node, condition: Expr, yes: Expr, no: Expr) -> Expr:
    """where(), as the node's dtype promotes: True beside 5 is 1."""
    if dtype(node) != torch.bool:
        yes, no = to_number(yes), to_number(no)
    return choose(condition, yes, no)


def bounded(lower: int | None, low_name: str, upper: int | None, high_name: str) -> Rule:
    """clamp and its relatives, of numbers that are known but for their indices."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
        value = to_number(reader.broadcast(node.args[0], index))
        low = None if lower is None else argument(node, lower, low_name)
        high = None if upper is None else argument(node, upper, high_name)
        for bound, function in ((low, sympy.Max), (high, sympy.Min)):
            if bound is not None:
                limit = to_number(reader.broadcast(bound, index))
                if _unknown(value) or _unknown(limit):
                    return None  # NaN is neither above nor below
                value = extreme(function, value, limit)
        return value

    return rule


def _unknown(value: Expr) -> bool:
    """Whether a number is not known, or one of those that it is a choice of."""
    if isinstance(value, sympy.Piecewise):
        return any(_unknown(branch) for branch, _ in value.args)
    return bool(loads(value))


def extreme(function: Any, a: Expr, b: Expr) -> Expr:
    """Max or Min; of choices a choice, so that conditions stay in sight."""
    if a.has(sympy.Piecewise) or b.has(sympy.Piecewise):
        return sympy.piecewise_fold(function(a, b))
    return function(a, b)


def absolute(reader: Reader, node: fx.Node, index: Index) -> Expr:
    value = to_number(reader.broadcast(node.args[0], index))
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((sympy.Abs(v), c) for v, c in value.args))
    return sympy.Abs(value)


def log(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """Of 0 and 1 alone: a mask that is multiplied, made one that is added."""
    value = to_number(reader.broadcast(node.args[0], index))
    known = {sympy.S.Zero: -sympy.oo, sympy.S.One: sympy.S.Zero}
    if isinstance(value, sympy.Piecewise) and all(v in known for v, _ in value.args):
        return sympy.Piecewise(*((known[v], c) for v, c in value.args))
    return known.get(value)


def floor_divide(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """Of integers, by a positive constant: floor, as Python's //."""
    if node.kwargs.get("rounding_mode", "floor") != "floor":
        return None
    value, divisor = (to_number(reader.broadcast(x, index)) for x in node.args[:2])
    if not (value.is_integer and divisor.is_Integer and divisor > 0):
        return None
    return sympy.floor(value / divisor)
