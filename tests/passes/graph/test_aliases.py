"""What shares memory and what is written: never less than what happens when a graph runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moonfx.passes.graph.aliases import aliases, is_opaque, last_writes, made_in_place, writes
from tests.support.bodies import nested
from tests.support.reading import traced

X, Y = torch.arange(12.0).view(3, 4) + 1, torch.full((3, 4), 5.0)
Run = Callable[[Tensor, Tensor], Any]


class Watched(fx.Interpreter):
    """Runs a graph; keeps each tensor, and what it held when it was made."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.made: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "output":
            self.made[n] = result, result.clone()
        return result

    def changed(self) -> set[fx.Node]:
        """The nodes that no longer hold what they were made with."""
        return {n for n, (now, then) in self.made.items() if not torch.equal(now, then)}


def a_view_is_written(x: Tensor, y: Tensor) -> Tensor:
    x.view(12)[2:5].add_(1)
    return x * y


def a_slice_is_set(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z[1] = y[0]
    return z + x


def an_operand_goes_out(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(3, 4)
    torch.add(x, y, out=z)
    return z


def a_list_is_written(x: Tensor, y: Tensor) -> Tensor:
    parts = x.unbind(0)
    torch._foreach_add_([parts[0], y], 1.0)
    return x.sum()


def a_flat_copy_is_written(x: Tensor, y: Tensor) -> Tensor:
    x.mT.flatten().add_(1)
    x.contiguous().mul_(2)
    return x


def a_mask_is_made_in_place(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(3, 4).masked_fill_(x > 3, -1.0).add_(y)


def a_zero_is_kept_and_written(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(3, 4)
    z.add_(x)
    return z * y


def an_unmarked_view_is_written(x: Tensor, y: Tensor) -> Tensor:
    torch.ops.aten._unsafe_view(x, [12]).add_(1)
    torch.unsafe_chunk(y, 3)[0].mul_(2)
    return x * y


PROGRAMS: list[Run] = [
    an_unmarked_view_is_written,
    a_view_is_written,
    a_slice_is_set,
    an_operand_goes_out,
    a_list_is_written,
    a_flat_copy_is_written,
    a_mask_is_made_in_place,
    a_zero_is_kept_and_written,
]


@pytest.mark.parametrize("run", PROGRAMS, ids=[r.__name__ for r in PROGRAMS])
def test_every_node_whose_memory_changes_is_known_to_be_written(run: Run) -> None:
    gm = traced(run, X, Y)
    watched = Watched(gm)
    watched.run(X.clone(), Y.clone())
    written = last_writes(gm.graph)
    fresh: set[fx.Node] = set()
    for node in gm.graph.nodes:
        fresh.update(made_in_place(node, fresh))
    assert watched.changed() - fresh <= written.keys()


@pytest.mark.parametrize("run", PROGRAMS, ids=[r.__name__ for r in PROGRAMS])
def test_every_operand_whose_memory_a_result_lies_in_is_an_alias(run: Run) -> None:
    gm = traced(run, X, Y)
    watched = Watched(gm)
    watched.run(X.clone(), Y.clone())
    place = {n: t.untyped_storage().data_ptr() for n, (t, _) in watched.made.items()}
    for node in watched.made:
        shared = {n for n in node.all_input_nodes if n in place and place[n] == place[node]}
        assert shared <= set(aliases(node)), node


def test_what_only_reads_is_written_nowhere() -> None:
    gm = traced(lambda x, y: (x.view(12) * y.flatten()).clone().sum(), X, Y)
    assert last_writes(gm.graph) == {}
    (view,) = (n for n in gm.graph.nodes if n.name == "view")
    (product,) = (n for n in gm.graph.nodes if n.name == "mul")
    assert aliases(view) == view.all_input_nodes
    assert aliases(product) == []


def test_the_last_of_several_writes_is_kept() -> None:
    gm = traced(lambda x, y: x.mul_(2).add_(y), X, Y)
    x, _, first, second, _ = gm.graph.nodes
    assert last_writes(gm.graph) == dict.fromkeys((x, first, second), second)


def test_memory_that_nobody_read_before_the_write_counts_as_made() -> None:
    gm = traced(a_mask_is_made_in_place, X, Y)
    zeros, fill, add = (n for n in gm.graph.nodes if n.name in ("zeros", "masked_fill_", "add_"))
    assert made_in_place(fill, set()) == [zeros, fill]
    assert made_in_place(add, set()) == []
    assert made_in_place(add, {zeros, fill}) == [fill, add]
    gm = traced(lambda x, y: (z := x * 2, z * y, z.add_(1))[1:], X, Y)
    (write,) = (n for n in gm.graph.nodes if n.name == "add_")
    assert made_in_place(write, set()) == [], "its operand is read before"


def test_a_body_writes_and_hands_back_what_is_written_and_handed_back_inside() -> None:
    def inside(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(1)
        return y.view(12), x * 2

    gm, call, body = nested(inside, X, Y)
    x, y = (n for n in gm.graph.nodes if n.op == "placeholder")
    assert writes(call) == [x]
    assert aliases(call) == [y]
    body.meta.clear()
    assert set(writes(call)) == {x, y}, "of a body that is not captured nothing is known"
    assert set(aliases(call)) == {x, y}


def unknown(x: Any) -> Any:
    return x


OPAQUE: list[tuple[str, Callable[[fx.Graph, fx.Node], fx.Node], bool]] = [
    ("an operator", lambda g, x: g.call_function(torch.ops.aten.neg.default, (x,)), False),
    ("a method", lambda g, x: g.call_method("neg", (x,)), True),
    ("a function of somebody's", lambda g, x: g.call_function(unknown, (x,)), True),
    ("a function of torch", lambda g, x: g.call_function(torch.neg, (x,)), True),
    ("an input", lambda g, x: x, False),
]


@pytest.mark.parametrize(("make", "expected"), [o[1:] for o in OPAQUE], ids=[o[0] for o in OPAQUE])
def test_the_effects_of_what_has_no_schema_are_unknown(
    make: Callable[[fx.Graph, fx.Node], fx.Node], expected: bool
) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    assert is_opaque(make(graph, x)) is expected
