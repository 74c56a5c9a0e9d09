"""Which memory a graph makes itself, who writes to it, and who reads it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moonfx.passes.graph.own_tensors import OwnTensors
from tests.support.reading import returned, traced

N = 4
X = torch.ones(N, N)


def node_of(gm: fx.GraphModule, name: str) -> fx.Node:
    (found,) = (n for n in gm.graph.nodes if n.name == name)
    return found


def through_a_view(x: Tensor) -> Tensor:
    m = torch.ones(N, N)
    m.view(-1).add_(1)
    m[0].mul_(x[0])
    return m + 1


def test_writes_through_views_are_of_the_memory_in_order() -> None:
    gm = traced(through_a_view, X)
    tensors, out = OwnTensors(gm.graph), returned(gm)
    made = node_of(gm, "ones")
    names = lambda place: [w.name for w in tensors.writers(made, place)]  # noqa: E731
    assert tensors.is_own(made)
    assert names(tensors.position[out]) == ["add_", "mul_"]
    assert names(tensors.position[node_of(gm, "mul_")]) == ["add_"]  # before it, not itself
    view = node_of(gm, "view")
    assert [w.name for w in tensors.writers(view, tensors.position[out])] == ["add_", "mul_"]


def test_readers_are_found_through_views_and_writes_are_none() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        m = torch.ones(N, N)
        row = m[0]
        m.copy_(x)
        torch._foreach_mul_([m], 2.0)  # which returns nothing
        return row + 1, m * 2

    gm = traced(run, X)
    tensors = OwnTensors(gm.graph)
    assert {n.name for n in tensors.readers(node_of(gm, "ones"))} == {"add", "mul"}
    assert {n.name for n in tensors.readers(node_of(gm, "x_1"))} == {"copy_"}


FOREIGN: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("an input", lambda x: x.add_(1) * 2),
    ("a view of an input", lambda x: x.view(-1)[:2].add_(1) * 2),
]


@pytest.mark.parametrize("run", [c[1] for c in FOREIGN], ids=[c[0] for c in FOREIGN])
def test_the_memory_of_an_input_is_not_the_graphs_own(run: Callable[[Tensor], Tensor]) -> None:
    gm = traced(run, X.clone())
    tensors = OwnTensors(gm.graph)
    written = next(n for n in gm.graph.nodes if "add_" in n.name)
    assert not tensors.is_own(written)
    assert tensors.is_own(returned(gm))  # a new tensor, whatever it was made of


def test_a_copy_is_memory_of_its_own() -> None:
    gm = traced(lambda x: x.to(torch.float64).add_(1) * 2, X)
    tensors = OwnTensors(gm.graph)
    written = next(n for n in gm.graph.nodes if "add_" in n.name)
    assert tensors.is_own(written)
    given = node_of(gm, "x_1")
    assert tensors.writers(given, len(tensors.position)) == []


def test_what_may_lie_in_one_of_two_tensors_is_not_known() -> None:
    def run(x: Tensor) -> Tensor:
        first, second = torch.broadcast_tensors(torch.ones(N, N), torch.zeros(N))
        return first + second

    gm = traced(run, X)
    ones, zeros, out = (node_of(gm, name) for name in ("ones", "zeros", "add"))
    tensors = OwnTensors(gm.graph)
    assert not tensors.is_own(ones)
    assert not tensors.is_own(zeros)
    assert tensors.is_own(out)


def test_what_an_unknown_function_was_given_is_not_the_graphs_own() -> None:
    gm = traced(lambda x: torch.ones(N) + 1, X)
    made = node_of(gm, "ones")
    with gm.graph.inserting_after(made):
        gm.graph.call_function(_keeps, (made,))
    assert not OwnTensors(gm.graph).is_own(made)


def _keeps(x: Tensor) -> None:
    """Something that no schema describes."""
