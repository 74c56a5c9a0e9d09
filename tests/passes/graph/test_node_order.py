"""Groups of nodes brought together: never across a read, a write, a draw or a mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.modes import switches_gradients
from moonfx.passes.graph.node_order import (
    depths,
    movable,
    predecessors,
    reorder,
    schedule,
    separator,
)
from tests.support.reading import traced

X, Y = torch.arange(6.0).view(2, 3), torch.full((2, 3), 2.0)
Run = Callable[[Tensor, Tensor], Any]


def named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {n.name: n for n in gm.graph.nodes}


def before(gm: fx.GraphModule) -> dict[fx.Node, set[fx.Node]]:
    return predecessors(gm.graph, Memory(gm.graph))


# A program, and pairs of nodes: the first must run before the second, or need not.
ORDERS: list[tuple[str, Run, list[tuple[str, str]], list[tuple[str, str]]]] = [
    (
        "a write after a read and before the next",
        lambda x, y: (x.exp(), x.add_(1), x.sin()),
        [("exp", "add_"), ("add_", "sin")],
        [],
    ),
    (
        "a write through a view",
        lambda x, y: (x.exp(), x.view(6).add_(1), x.sin()),
        [("exp", "add_"), ("add_", "sin")],
        [],
    ),
    (
        "random numbers",
        lambda x, y: (torch.rand_like(x), y.exp(), torch.rand_like(x)),
        [("rand_like", "rand_like_1")],
        [("rand_like", "exp"), ("exp", "rand_like_1")],
    ),
    (
        "what has nothing to do with one another",
        lambda x, y: (x.exp(), y.sin()),
        [],
        [("exp", "sin"), ("sin", "exp")],
    ),
]


def must_run_before(gm: fx.GraphModule, first: str, second: str) -> bool:
    n, edges = named(gm), before(gm)
    reached, stack = set(), [n[second]]
    while stack:
        for node in edges[stack.pop()] - reached:
            reached.add(node)
            stack.append(node)
    return n[first] in reached


@pytest.mark.parametrize(
    ("run", "ordered", "free"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS]
)
def test_what_must_stay_in_order_does(
    run: Run, ordered: list[tuple[str, str]], free: list[tuple[str, str]]
) -> None:
    gm = traced(run, X, Y)
    for first, second in ordered:
        assert must_run_before(gm, first, second), (first, second)
    for first, second in free:
        assert not must_run_before(gm, first, second), (first, second)


def test_a_node_of_unknown_effects_stays_between_all_that_it_stood_between() -> None:
    gm = traced(lambda x, y: (x.exp(), y.sin()), X, Y)
    n = named(gm)
    with gm.graph.inserting_after(n["exp"]):
        unknown = gm.graph.call_method("anything", (n["y_1"],))
    edges = before(gm)
    assert {n["exp"], n["x_1"], n["y_1"]} <= edges[unknown]
    assert unknown in edges[n["sin"]]


def two_products(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a = x @ y.mT
    b = a.exp()
    c = y @ x.mT
    return a, b, c.sin()


def grouped(gm: fx.GraphModule, *names: str) -> list[fx.Node | list[fx.Node]]:
    n = named(gm)
    group = {n[name]: 0 for name in names}
    return schedule(movable(gm.graph), before(gm), group)


def test_a_group_stands_in_one_place_and_the_graph_computes_the_same() -> None:
    gm = traced(two_products, X, Y)
    n, expected = named(gm), two_products(X, Y)
    order = grouped(gm, "matmul", "matmul_1")
    assert [n["matmul"], n["matmul_1"]] in order
    reorder(gm.graph, order, True)
    gm.graph.lint()
    gm.recompile()
    for found, wanted in zip(gm(X, Y), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    names = [node.name for node in gm.graph.nodes]
    assert names.index("matmul_1") == names.index("matmul") + 1


def test_what_depends_on_itself_through_a_group_is_left_out() -> None:
    gm = traced(lambda x, y: (x @ y.mT).exp() @ x, X, Y)
    n = named(gm)
    order = grouped(gm, "matmul", "matmul_1")
    flat = [m for item in order for m in (item if isinstance(item, list) else [item])]
    assert n["matmul"] not in flat
    group = [n["matmul"], n["matmul_1"]]
    assert separator(movable(gm.graph), before(gm), set(group)) is n["exp"]
    with pytest.raises(ValueError, match="an order of"):
        reorder(gm.graph, order, True)


def test_nothing_separates_what_can_stand_side_by_side() -> None:
    gm = traced(two_products, X, Y)
    n = named(gm)
    both = {n["matmul"], n["matmul_1"]}
    assert separator(movable(gm.graph), before(gm), both) is None


def test_groups_that_do_not_wait_for_one_another_have_one_depth() -> None:
    gm = traced(lambda x, y: (x.exp(), y.exp(), (x.exp() + y).sin()), X, Y)
    n = named(gm)
    group = {n["exp"]: 0, n["exp_1"]: 1, n["exp_2"]: 2, n["sin"]: 3}
    assert depths(movable(gm.graph), before(gm), group) == {0: 0, 1: 0, 2: 0, 3: 1}


def test_gradients_are_switched_where_neighbours_differ() -> None:
    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            a = x.exp()
        b = y.sin()
        with torch.no_grad():
            c = x.cos()
        return a, b, c

    gm = traced(run, X, Y)
    n = named(gm)
    reorder(gm.graph, grouped(gm, "exp", "cos"), True)
    gm.recompile()
    mode, seen = True, {}
    for node in gm.graph.nodes:
        mode = bool(node.args[0]) if switches_gradients(node) else mode
        seen[node] = mode
    assert [seen[n[name]] for name in ("exp", "sin", "cos")] == [False, True, False]
    y = Y.clone().requires_grad_()
    a, b, c = gm(X.clone().requires_grad_(), y)
    assert [t.requires_grad for t in (a, b, c)] == [False, True, False]
