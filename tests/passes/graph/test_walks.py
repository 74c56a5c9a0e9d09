"""Walks over a small graph: what is reached, what is left out, and what a view stands for."""

import pytest
import torch
from torch import fx

from moonfx.passes.graph.operators import CASTS, COPIES
from moonfx.passes.graph.walks import downstream, look_through, reachable, upstream

aten = torch.ops.aten


@pytest.fixture
def nodes() -> dict[str, fx.Node]:
    """x -> copy -> cast -> a; x, a -> b; an operator of y that reads none of them."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    copy = graph.call_function(aten.clone.default, (x,))
    cast = graph.call_function(aten.to.dtype, (copy, torch.float64))
    a = graph.call_function(aten.neg.default, (cast,))
    b = graph.call_function(aten.add.Tensor, (a, x))
    other = graph.call_function(aten.neg.default, (y,))
    return {"x": x, "y": y, "copy": copy, "cast": cast, "a": a, "b": b, "other": other}


def _names(found: set[fx.Node], nodes: dict[str, fx.Node]) -> set[str]:
    return {name for name, node in nodes.items() if node in found}


def test_upstream_holds_its_start_and_all_that_it_is_made_of(nodes: dict[str, fx.Node]) -> None:
    assert _names(upstream([nodes["a"]]), nodes) == {"a", "cast", "copy", "x"}


def test_what_stops_a_walk_is_left_out_and_other_ways_are_followed(
    nodes: dict[str, fx.Node],
) -> None:
    found = upstream([nodes["b"]], stop=lambda node: node is nodes["cast"])
    assert _names(found, nodes) == {"b", "a", "x"}


def test_inputs_say_what_is_followed(nodes: dict[str, fx.Node]) -> None:
    found = upstream([nodes["b"]], inputs=lambda node: node.all_input_nodes[:1])
    assert _names(found, nodes) == {"b", "a", "cast", "copy", "x"}


def test_downstream_holds_its_start_and_all_that_is_made_of_it(nodes: dict[str, fx.Node]) -> None:
    assert _names(downstream([nodes["cast"]]), nodes) == {"cast", "a", "b"}
    assert _names(downstream([nodes["y"]]), nodes) == {"y", "other"}
    found = downstream([nodes["x"]], stop=lambda node: node is nodes["a"])
    assert _names(found, nodes) == {"x", "copy", "cast", "b"}


def test_a_walk_in_a_circle_ends() -> None:
    assert reachable([1], lambda n: [n % 5 + 1]) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("operators", "expected"),
    [(set(), "cast"), (CASTS, "copy"), (COPIES, "cast"), (CASTS | COPIES, "x")],
    ids=["none", "casts", "copies above a cast", "casts and copies"],
)
def test_what_a_node_stands_for_is_the_first_that_is_no_such_operator(
    operators: set[object], expected: str, nodes: dict[str, fx.Node]
) -> None:
    assert look_through(nodes["cast"], operators) is nodes[expected]
