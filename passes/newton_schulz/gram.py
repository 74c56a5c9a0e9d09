"""Finds products of a matrix and its own transpose, however the two are written."""

from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory, TensorVersion
from moonfx.passes.newton_schulz.matmuls import ADDING, PRODUCTS, einsum_chain
from moonfx.passes.newton_schulz.operands import Unclear
from moonfx.passes.newton_schulz.operators import terms_of
from moonfx.passes.newton_schulz.views import VIEWS

aten = torch.ops.aten

# These multiply by the transpose of their second operand.
_TRANSPOSING = {aten.linear.default, aten.inner.default, aten.inner.out}


def gram_source(node: fx.Node, memory: Memory) -> TensorVersion | None:
    """X of a node X X^T or X^T X, else None."""
    found = factors(node)
    if found is None or not all(isinstance(n, fx.Node) for n in found[0]):
        return None
    (left, right), differences = found
    theirs = dict(same_as(memory.read(node, right), memory))
    for value, transposed in same_as(memory.read(node, left), memory):
        is_gram = value in theirs and (transposed ^ theirs[value]) in differences
        if is_gram and is_matrix(value, memory):
            return value
    return None


def factors(node: fx.Node) -> tuple[list[Any], set[bool]] | None:
    """Two matrices that a node multiplies, and whether they must differ by a transpose.

    The second is {True}, {False}, or both where the node may be either.
    """
    if node.target in _TRANSPOSING:
        return list(node.args[:2]), {False}
    if node.target in ADDING:
        return list(node.args[1:3]), {True}
    if node.target in PRODUCTS:
        return list(node.args[:2]), {True}
    if node.target is aten.tensordot.default:
        return list(node.args[:2]), {True, False}
    if node.target is aten.einsum.default:
        order = einsum_chain(str(node.args[0]))
        operands: Any = node.args[1]
        if order is None or len(order) != len(operands) or len(order) < 2:
            return None
        (first, back), (second, forth) = order[:2]
        return [operands[first], operands[second]], {back == forth}
    return None


def same_as(value: TensorVersion, memory: Memory) -> list[tuple[TensorVersion, bool]]:
    """A value and all that it is a view or copy of, nearest first; whether each is transposed."""
    found, transposed = [(value, False)], False
    while value.node.target in VIEWS and memory.result(value.node) == value:
        try:
            terms = terms_of(value.node, lambda operand: {"X": 1.0})
        except Unclear:
            break
        transposed ^= "T" in terms
        value = memory.read(value.node, value.node.args[0])  # type: ignore[arg-type]
        found.append((value, transposed))
    return found


def is_matrix(value: TensorVersion, memory: Memory) -> bool:
    """Whether a value is a floating point matrix or a batch of them, as its node made it."""
    tensor = value.node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return False
    return tensor.dtype.is_floating_point and memory.result(value.node) == value
