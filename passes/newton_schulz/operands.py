"""What the rules share that read the operators of a Newton-Schulz step, and why they cannot."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import expression
from moonfx.passes.newton_schulz.polynomials import Terms, product

aten = torch.ops.aten


class Unclear(Exception):
    """A node that a step might hold, but not this way; the message says why."""


class TooLong(Exception):
    """A product of a higher degree than a step has."""


# An operand of a node -> its polynomial; raises KeyError for one that is none.
GetTerms = Callable[[Any], Terms]
# A node, and how to get the polynomials of its operands -> its own.
TermRule = Callable[[fx.Node, GetTerms], Terms]


def alike(node: fx.Node, *operands: Any) -> None:
    """Checks that no row or column of an operand is repeated to fit the others."""
    for each in operands:
        if not (isinstance(each, fx.Node) and is_tensor(each)):
            raise Unclear("a number is added to every entry")
        if shape(each)[-2:] != shape(node)[-2:]:
            raise Unclear("a row or column is broadcast over a matrix")


def number(value: Any) -> float:
    if isinstance(value, fx.Node) and is_tensor(value):
        raise Unclear("a coefficient is a tensor, and not a number of the graph")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unclear("a coefficient is not known when the graph is compiled")
    return float(value)


def is_tensor(node: fx.Node) -> bool:
    """Not a size or a learning rate that is a symbol."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def size(node: fx.Node) -> int:
    value = node.meta.get("val")
    found = value.numel() if isinstance(value, torch.Tensor) else 0
    return found if isinstance(found, int) else 0


def shape(node: fx.Node) -> list[Any]:
    """The sizes of a tensor node, as `nodes.shape` has them, and quicker where they are numbers."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    return [n if type(n) is int else expression(n) for n in value.shape]


def times(left: Terms, right: Terms) -> Terms:
    out = product(left, right)
    if out is None:
        raise TooLong
    return out


def overloads(names: str, rule: TermRule) -> dict[Any, TermRule]:
    """Each of "packet.overload", its in-place and its out= form, where torch has it -> its rule."""
    found: dict[Any, TermRule] = {}
    for name in names.split():
        packet, overload = name.split(".")
        for each, kind in ((packet, overload), (f"{packet}_", overload), (packet, "out")):
            target = getattr(getattr(aten, each, None), kind, None)
            if target is not None:
                found[target] = rule
    return found


def named(names: str, rule: TermRule) -> dict[Any, TermRule]:
    """Each of "packet.overload", where torch has it -> its rule."""
    pairs = (name.split(".") for name in names.split())
    found = (getattr(getattr(aten, packet, None), overload, None) for packet, overload in pairs)
    return {target: rule for target in found if target is not None}
