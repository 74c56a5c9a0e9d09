"""The modes that nodes run under: gradients on or off, and the autocasts they are in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moonfx.passes.graph.modes import Mode, inside, modes, switches_gradients
from tests.support.bodies import nested
from tests.support.reading import traced

X = torch.ones(3)
Run = Callable[[Tensor], object]


def no_grad(x: Tensor) -> tuple[Tensor, ...]:
    a = x * 2
    with torch.no_grad():
        b = x.exp()
        with torch.enable_grad():
            c = x.sin()
        d = x.cos()
    return a, b, c, d, x + 1


def test_gradients_are_as_they_were_switched_last() -> None:
    gm = traced(no_grad, X)
    for start in (True, False):
        found = modes(gm.graph, Mode(start))
        of = {n.name: found[n].gradients for n in gm.graph.nodes}
        assert of["mul"] is start
        assert (of["exp"], of["sin"], of["cos"], of["add"]) == (False, True, False, True)
    switches = [n for n in gm.graph.nodes if switches_gradients(n)]
    assert [n.args[0] for n in switches] == [False, True, False, True]


def test_each_node_knows_the_autocasts_that_it_is_in() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")

    def node() -> fx.Node:
        return graph.call_function(torch.ops.aten.neg.default, (x,))

    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    first = graph.call_function(enter, ("cpu", torch.bfloat16, True, True))
    one = node()
    second = graph.call_function(enter, ("cpu", torch.bfloat16, False, True))
    both = node()
    graph.call_function(leave, (first,))
    rest = node()
    graph.call_function(leave, (second,))
    none = node()
    found = modes(graph, Mode(True))
    assert [found[n].autocast for n in (x, one, both, rest, none)] == [
        (),
        (first,),
        (first, second),
        (second,),
        (),
    ]


@pytest.mark.parametrize(
    ("by", "gradients"), [("region", True), ("wrap", True), ("no_grad", False)]
)
def test_a_body_starts_with_the_mode_of_its_call(by: str, gradients: bool) -> None:
    _, call, _ = nested(lambda x: x * 2, X, by=by)
    assert inside(call, Mode(True)) == Mode(gradients)
    assert inside(call, Mode(False)) == Mode(False)


def test_a_body_under_autocast_is_in_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    target = torch.ops.higher_order.wrap_with_autocast
    call = graph.call_function(target, ("cpu", torch.bfloat16, True, True, x, x))
    assert inside(call, Mode(True)) == Mode(True, (call,))
