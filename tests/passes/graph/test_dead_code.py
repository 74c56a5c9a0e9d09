"""What may be removed because nobody reads it, and what does something of its own."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from moonfx.passes.graph.aliases import last_writes
from moonfx.passes.graph.dead_code import remove_dead_code
from moonfx.passes.graph.memory_versions import Memory

aten = torch.ops.aten
DATA = torch._C._autograd._get_data_attr
Write = Callable[[fx.Graph, fx.Node], fx.Node]


def unknown(x: Any) -> Any:
    return x


def _graph(write: Write, value: Any = None) -> tuple[fx.Graph, fx.Node]:
    """A graph of one input that writes and returns nothing."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2) if value is None else value
    write(graph, x)
    graph.output(())
    return graph, x


def through_data(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul_.Tensor, (graph.call_function(DATA, (x,)), 0.5))


def through_an_unknown_view(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul_.Tensor, (graph.call_method("to_local", (x,)), 0.5))


def to_new_memory(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul_.Tensor, (graph.call_function(aten.neg.default, (x,)), 2))


# How many nodes stay of those between the input and the output, and whether the input is written.
WRITES: list[tuple[str, Write, int, bool]] = [
    ("data.mul_", through_data, 2, True),
    ("to_local().mul_", through_an_unknown_view, 2, True),
    ("new memory", to_new_memory, 0, False),
    ("data alone", lambda graph, x: graph.call_function(DATA, (x,)), 0, False),
    ("method mul_", lambda graph, x: graph.call_method("mul_", (x, 2)), 1, True),
    ("method __imul__", lambda graph, x: graph.call_method("__imul__", (x, 2)), 1, True),
    ("method t", lambda graph, x: graph.call_method("t", (x,)), 1, False),
    ("imul", lambda graph, x: graph.call_function(operator.imul, (x, 2)), 1, True),
    ("foreach", lambda graph, x: graph.call_function(torch._foreach_mul_, ([x], 2)), 1, True),
    ("unknown", lambda graph, x: graph.call_function(unknown, (x,)), 1, True),
]


@pytest.mark.parametrize(
    ("write", "stay", "written"), [w[1:] for w in WRITES], ids=[w[0] for w in WRITES]
)
def test_a_write_that_nobody_reads_is_not_dead(write: Write, stay: int, written: bool) -> None:
    graph, x = _graph(write)
    assert (x in last_writes(graph)) is written
    remove_dead_code(graph)
    assert len(graph.nodes) - 2 == stay


def test_arithmetic_on_sizes_is_dead_where_nobody_reads_it() -> None:
    graph, _ = _graph(lambda graph, x: graph.call_function(operator.imul, (x, 2)), 3)
    remove_dead_code(graph)
    assert len(graph.nodes) == 2


def test_nobody_s_data_is_more_than_a_view_of_it() -> None:
    graph, x = _graph(through_data)
    memory = Memory(graph)
    data, write = (n for n in graph.nodes if n.op == "call_function")
    assert memory.of(data) is memory.of(x)
    assert memory.writers(x, write) == [write]
