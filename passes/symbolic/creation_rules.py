"""Rules for operators that make a tensor of an index: arange, full, cumsum, triangles."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, axis, dtype, shape
from moonfx.passes.symbolic.expressions import (
    Expr,
    Index,
    Reader,
    Rule,
    choose,
    constant,
    is_boolean,
    to_number,
)
from moonfx.passes.symbolic.pointwise_rules import choose_for

aten = torch.ops.aten


def fill(position: int, name: str = "fill_value") -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr:
        return reader.read(argument(node, position, name), ())

    return rule


def filled_with(value: int) -> Rule:
    return lambda reader, node, index: constant(value)


def arange(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    start = 0 if node.target is aten.arange.default else argument(node, 0, "start")
    step = argument(node, 2, "step", 1) if node.target is aten.arange.start_step else 1
    start, step = reader.read(start, ()), reader.read(step, ())
    if not (start.is_integer and step.is_integer):
        return None
    return start + index[0] * step


def cumsum(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """Only of a constant: the sum of k + 1 equal terms."""
    dim = axis(node, argument(node, 1, "dim"))
    term = to_number(reader.read(node.args[0], index))
    return term * (index[dim] + 1) if term.is_Integer else None


def diff(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
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


def triangular(relation: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Expr:
        diagonal = reader.read(argument(node, 1, "diagonal", 0), ())
        inside = relation(index[-1] - index[-2], diagonal)
        value = reader.read(node.args[0], index)
        return choose_for(node, inside, value, sympy.false if is_boolean(value) else sympy.S.Zero)

    return rule
