"""Writes one call of the operator for several iterations.

before  X [m, n], Y [n, m]
after   moonfx::newton_schulz(stack([X, Y.mT]), ..) -> unbind -> X_k, Y_k.mT
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import insert
from moonfx.passes.newton_schulz import batching
from moonfx.passes.newton_schulz.iterations import Chain

aten = torch.ops.aten
OPERATOR = torch.ops.moonfx.newton_schulz.default

Write = Callable[..., fx.Node]


def write_call(members: list[Chain], form: str, before: fx.Node) -> list[fx.Node]:
    """X_k of each member, in its own shape and strides, by one call right before a node."""

    def write(target: Any, *args: Any) -> fx.Node:
        return insert(target, args, before, members[0].output)

    m, n = batching.common_sides(members)
    batches = [tuple(chain.value.shape[:-2]) for chain in members]
    stacked = not any(batches)  # matrices, none of them in a batch
    transposed = [
        batching.is_transposed(chain) ^ (batching.sides(chain) != (m, n)) for chain in members
    ]
    operands = []
    for chain, batch, turn in zip(members, batches, transposed, strict=True):
        x = write(aten.mT.default, chain.source.node) if turn else chain.source.node
        if not stacked and len(batch) != 1:
            x = write(aten.reshape.default, x, [-1, m, n])
        operands.append(x)
    numbers = [float(x) for step in members[0].coefficients for x in step]
    counts = None if stacked else [math.prod(batch) for batch in batches]
    results = _computed(operands, numbers, form, counts, write)
    for i, (chain, batch, turn) in enumerate(zip(members, batches, transposed, strict=True)):
        if not stacked and len(batch) != 1:
            results[i] = write(aten.reshape.default, results[i], [*batch, m, n])
        results[i] = _as_it_was(results[i], chain, turn, write)
    return results


def _computed(
    operands: list[fx.Node],
    numbers: list[float],
    form: str,
    counts: list[int] | None,
    write: Write,
) -> list[fx.Node]:
    """The operator's result for each operand.

    Args:
        counts: how many matrices each operand is a batch of, None where each is one matrix.
    """
    if len(operands) == 1:
        return [write(OPERATOR, operands[0], numbers, form)]
    if counts is None:
        out = write(OPERATOR, write(aten.stack.default, operands), numbers, form)
        parts = write(aten.unbind.int, out)
    else:
        out = write(OPERATOR, write(aten.cat.default, operands), numbers, form)
        parts = write(aten.split_with_sizes.default, out, counts)
    return [write(operator.getitem, parts, i) for i in range(len(operands))]


def _as_it_was(result: fx.Node, chain: Chain, transposed: bool, write: Write) -> fx.Node:
    """X_k as the iteration's author made it: its rows or columns together, no view if it was none.

    Args:
        transposed: whether the operator was given the transpose of X_0.
    """
    if chain.transposed ^ transposed ^ chain.column:
        result = write(aten.contiguous.default, write(aten.mT.default, result))
    if chain.column:
        result = write(aten.mT.default, result)
    if chain.own and result.meta["val"]._is_view():
        result = write(aten.clone.default, result)
    return result
