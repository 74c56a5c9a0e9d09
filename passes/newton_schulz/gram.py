"""Finds products of a matrix and its own transpose, however the two are written."""

from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory, Value
from moonfx.passes.newton_schulz.matmuls import ADDING, PRODUCTS, path
from moonfx.passes.newton_schulz.operands import Unclear
from moonfx.passes.newton_schulz.operators import terms_of
from moonfx.passes.newton_schulz.views import VIEWS

aten = torch.ops.aten

# Multiply by the transpose of their second operand.
_TURNING = {aten.linear.default, aten.inner.default, aten.inner.out}


def gram_source(node: fx.Node, memory: Memory) -> Value | None:
    """X of a node X X^T or X^T X, else None."""
    found = factors(node)
    if found is None or not all(isinstance(n, fx.Node) for n in found[0]):
        return None
    (left, right), turns = found
    theirs = dict(same_as(memory.read(node, right), memory))
    for value, turned in same_as(memory.read(node, left), memory):
        if value in theirs and (turned ^ theirs[value]) in turns and is_matrix(value, memory):
            return value
    return None


def factors(node: fx.Node) -> tuple[list[Any], set[bool]] | None:
    """Two matrices that a node multiplies, and whether one must be the other's transpose."""
    if node.target in _TURNING:
        return list(node.args[:2]), {False}
    if node.target in ADDING:
        return list(node.args[1:3]), {True}
    if node.target in PRODUCTS:
        return list(node.args[:2]), {True}
    if node.target is aten.tensordot.default:
        return list(node.args[:2]), {True, False}
    if node.target is aten.einsum.default:
        order = path(str(node.args[0]))
        operands: Any = node.args[1]
        if order is None or len(order) != len(operands) or len(order) < 2:
            return None
        (first, back), (second, forth) = order[:2]
        return [operands[first], operands[second]], {back == forth}
    return None


def same_as(value: Value, memory: Memory) -> list[tuple[Value, bool]]:
    """A value and all that it is a view or copy of, nearest first, each with whether transposed."""
    found, turned = [(value, False)], False
    while value.node.target in VIEWS and memory.result(value.node) == value:
        try:
            terms = terms_of(value.node, lambda operand: {"X": 1.0})
        except Unclear:
            break
        turned ^= "T" in terms
        value = memory.read(value.node, value.node.args[0])  # type: ignore[arg-type]
        found.append((value, turned))
    return found


def is_matrix(value: Value, memory: Memory) -> bool:
    """Whether a value is a floating point matrix or a batch of them, as its node made it."""
    tensor = value.node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return False
    return tensor.dtype.is_floating_point and memory.result(value.node) == value
