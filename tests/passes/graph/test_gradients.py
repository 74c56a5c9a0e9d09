"""Through which nodes gradients may flow, and where they end."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moonfx.capture.graph_nodes import BUFFER, TRAINED
from moonfx.passes.graph.gradients import Gradients
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.modes import Mode, modes
from moonfx.passes.graph.nesting import Nesting
from tests.support.bodies import nested
from tests.support.reading import returned, traced

X, Y = torch.ones(3), torch.ones(3)


def gradients(gm: fx.GraphModule, frozen: Callable[[fx.Node], bool] = lambda n: False) -> Gradients:
    def mode(node: fx.Node) -> Mode:
        return modes(node.graph, Mode(True))[node]

    return Gradients(Nesting(gm, ""), mode, frozen)


def untrained(gm: fx.GraphModule, *names: str) -> None:
    for node in gm.graph.nodes:
        if node.name in names:
            node.meta[TRAINED] = False


# What a function of x, which is trained, and y, which is not, returns; whether it needs a gradient.
NEEDED: list[tuple[str, Callable[[Tensor, Tensor], Tensor], bool]] = [
    ("of both", lambda x, y: x * y, True),
    ("of the other", lambda x, y: y * 2, False),
    ("detached", lambda x, y: x.detach() * y, False),
    ("of its sign", lambda x, y: y[(x > 0).long()], False),
    ("written into it", lambda x, y: (v := (z := y * 2).view(3), z.add_(x), v * 2)[2], True),
    ("the other written", lambda x, y: (v := (z := y * 2).view(3), z.add_(y), v * 2)[2], False),
    ("written after", lambda x, y: (w := (z := y * 2).view(3) * 2, z.add_(x), w)[2], False),
]


@pytest.mark.parametrize(("run", "expected"), [n[1:] for n in NEEDED], ids=[n[0] for n in NEEDED])
def test_a_gradient_is_needed_where_it_may_flow_from_what_is_trained(
    run: Callable[[Tensor, Tensor], Tensor], expected: bool
) -> None:
    gm = traced(run, X, Y)
    untrained(gm, "y_1")
    assert gradients(gm).needed(returned(gm), Memory(gm.graph)) is expected


def test_no_gradient_is_needed_where_gradients_are_off() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return x * y

    gm = traced(run, X, Y)
    assert not gradients(gm).needed(returned(gm), Memory(gm.graph))


def test_an_input_of_a_body_is_trained_if_it_is_outside() -> None:
    gm, _, body = nested(lambda x, y: x * y, X, Y)
    node = returned(body)
    assert gradients(gm).needed(node, Memory(body.graph, False))
    untrained(gm, "outer_x_1", "outer_y_1")
    assert not gradients(gm).needed(node, Memory(body.graph, False))


def test_a_gradient_ends_at_a_detach_of_what_is_trained() -> None:
    gm = traced(lambda x, y: x.exp().detach() * y.detach(), X, Y)
    one, other = returned(gm).all_input_nodes
    y = next(n for n in gm.graph.nodes if n.name == "y_1")
    found = gradients(gm, lambda node: node is y)
    assert [found.end_at(n) for n in (one, other, one.args[0])] == [True, False, False]


def test_a_gradient_ends_at_no_buffer() -> None:
    gm = traced(lambda x: x.detach() * 2, X)
    (detached,) = returned(gm).all_input_nodes
    assert gradients(gm).end_at(detached)
    next(iter(gm.graph.nodes)).meta[BUFFER] = X
    assert not gradients(gm).end_at(detached)
