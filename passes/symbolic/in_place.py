"""Reads a tensor that the graph makes and then writes to, as a node of the graph sees it.

    m = ones(N, N).triu(1)
    b = m.bool()
    m.masked_fill_(b, -inf)        m[i, j] from here: where(b[i, j], -inf, m[i, j] before)
    m[:, :k] = 0                   m[i, j] from here: where(j < k, 0, m[i, j] before)

A write is a value of what it writes to, made of what it reads at its own place in the graph. Of a
tensor that is not the graph's own (graph/own_tensors.py), or that a loop writes row by row, nothing
is said.
"""

from collections.abc import Sequence
from typing import Protocol

import sympy
from torch import fx

from moonfx.passes.graph.aliases import writes
from moonfx.passes.graph.nodes import argument, axis, permutation, shape
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.graph.own_tensors import OwnTensors
from moonfx.passes.symbolic.expressions import Expr, Index, Reader, aligned
from moonfx.passes.symbolic.pointwise_rules import choose_for
from moonfx.passes.symbolic.rules import RULES, VIEWS
from moonfx.passes.symbolic.view_rules import (
    position,
    reshape,
    reshaped,
    same,
    select,
    sliced,
    unsqueeze,
)

# Each write makes a value of two.
_MOST_WRITES = 8


class PlacedReader(Reader, Protocol):
    """What is asked of symbolic/reader.py for."""

    def read_before(self, node: object, index: Index, place: int) -> Expr:
        """A node's value at an index, as a node at a place in the graph sees it."""
        ...

    def value(self, node: fx.Node, index: Index, place: int) -> Expr:
        """A node's value by its operator's rule, from operands as they are before a place."""
        ...


class SeenFrom:
    """A reader of a node's operands, as they are before a place in the graph."""

    def __init__(self, reader: PlacedReader, place: int) -> None:
        self.reader, self.place = reader, place

    def read(self, node: object, index: Sequence[Expr]) -> Expr:
        return self.reader.read_before(node, tuple(index), self.place)

    def broadcast(self, node: object, index: Index) -> Expr:
        return self.read(node, aligned(node, index) if isinstance(node, fx.Node) else ())


def value(
    reader: PlacedReader, tensors: OwnTensors, node: fx.Node, index: Index, place: int
) -> Expr | None:
    """A node's value at an index, before a place in the graph; None if that is not known."""
    writers = tensors.writers(node, place)
    if not tensors.is_own(node) or len(writers) > _MOST_WRITES:
        return None
    made = tensors.position[node]
    if not writers or tensors.position[writers[-1]] <= made:
        return reader.value(node, index, made)
    sources = tensors.sources(node)
    if not sources:
        return _after(reader, tensors, writers[-1], node, index)
    if writes(node) == sources:  # of x.add_(y), which is x
        return reader.read_before(sources[0], index, place)
    return reader.value(node, index, place) if node.target in VIEWS | CASTS else None


def _after(
    reader: PlacedReader, tensors: OwnTensors, writer: fx.Node, node: fx.Node, index: Index
) -> Expr | None:
    """The value of a node that is no view, after a write to it or through a view of it."""
    targets = writes(writer)
    if len(targets) != 1 or writer.target not in RULES:
        return None
    found = _seen_through(reader, tensors, targets[0], index)
    if found is None:
        return None
    inside, at = found
    place = tensors.position[writer]
    written = reader.value(writer, at, place)
    if inside == True:  # noqa: E712
        return written
    return choose_for(node, inside, written, reader.read_before(node, index, place))


def _seen_through(
    reader: PlacedReader, tensors: OwnTensors, view: fx.Node, index: Index
) -> tuple[Expr, Index] | None:
    """Whether a view shows an element of what it is a view of, and at which index."""
    chain: list[fx.Node] = []
    while sources := tensors.sources(view):
        chain.append(view)
        (view,) = sources
    inside = sympy.true
    for view in reversed(chain):
        found = _shown(reader, view, index)
        if found is None:
            return None
        inside, index = sympy.And(inside, found[0]), found[1]
    return inside, index


def _shown(reader: PlacedReader, view: fx.Node, index: Index) -> tuple[Expr, Index] | None:
    """The same for one operator that makes a view."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape(source), shape(view)
    rule = RULES.get(view.target)
    if (order := permutation(view)) is not None:
        return sympy.true, tuple(index[dim] for dim in order)
    if before == after and (rule is same or view.target in CASTS or writes(view) == [source]):
        return sympy.true, index
    if rule is sliced:
        dim = axis(source, argument(view, 1, "dim", 0))
        start = argument(view, 2, "start")
        begin = position(reader, 0 if start is None else start, before[dim])
        if begin is None or argument(view, 4, "step", 1) != 1:
            return None
        if (begin, after[dim]) == (0, before[dim]):
            return sympy.true, index
        at = index[dim] - begin
        return sympy.And(at >= 0, at < after[dim]), (*index[:dim], at, *index[dim + 1 :])
    if rule is select:
        dim = axis(source, argument(view, 1, "dim"))
        chosen = position(reader, argument(view, 2, "index"), before[dim])
        rest = (*index[:dim], *index[dim + 1 :])
        return None if chosen is None else (sympy.Eq(index[dim], chosen), rest)
    if rule in (reshape, unsqueeze):
        at = reshaped(after, before, index)
        return None if at is None else (sympy.true, at)
    return None
