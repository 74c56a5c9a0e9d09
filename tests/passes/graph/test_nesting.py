"""The bodies that a graph calls: their inputs outside, and names by the call that they are in."""

import pytest
import torch
from torch import Tensor, fx

from moonfx.capture.graph_nodes import INPUT, placeholders
from moonfx.passes.graph.nesting import Nesting
from tests.support.bodies import nested

X, Y = torch.ones(3), torch.ones(3)


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def test_an_input_of_a_body_is_what_the_body_is_called_with() -> None:
    gm, call, body = nested(product, X, Y)
    nesting = Nesting(gm, "")
    outside, within = placeholders(gm.graph), placeholders(body.graph)
    assert nesting.call_of(body.graph) is call
    assert nesting.call_of(gm.graph) is None
    assert [nesting.outer(n) for n in within] == outside
    assert [nesting.outer(n) for n in outside] == [None, None]
    assert [nesting.outermost(n) for n in within] == outside


def test_a_body_in_a_body_is_followed_to_the_outermost_graph() -> None:
    inner, _, innermost = nested(product, X, Y)
    gm, call, _ = nested(product, X, Y)
    gm.body = inner
    nesting = Nesting(gm, "")
    found = [nesting.outermost(n) for n in placeholders(innermost.graph)]
    assert found == placeholders(gm.graph)
    assert nesting.call_of(inner.graph) is call


def test_a_number_that_a_body_is_given_is_no_node() -> None:
    gm, call, body = nested(product, X, Y)
    call.update_arg(len(call.args) - 1, 2.0)
    first, second = placeholders(body.graph)
    nesting = Nesting(gm, "")
    assert nesting.outer(first) is placeholders(gm.graph)[0]
    assert nesting.outer(second) is None


def test_inputs_are_counted_anew_once_a_body_has_others() -> None:
    gm, call, body = nested(product, X, Y)
    nesting = Nesting(gm, "")
    first, second = placeholders(body.graph)
    assert nesting.outer(second) is placeholders(gm.graph)[1]
    second.replace_all_uses_with(first)
    first.replace_all_uses_with(second)
    body.graph.erase_node(first)
    call.args = (*call.args[:-2], call.args[-1])
    nesting.changed(body.graph)
    assert nesting.outer(second) is placeholders(gm.graph)[1]


def test_an_input_goes_by_the_users_name_for_it() -> None:
    gm, _, _ = nested(product, X, Y)
    x, y = placeholders(gm.graph)
    x.meta[INPUT], y.meta[INPUT] = (True, "norm.weight"), (False, "mask")
    assert [Nesting(gm, "layers.3").name_of(n) for n in (x, y)] == ["layers.3.norm.weight", "mask"]
    assert [Nesting(gm, root).name_of(x) for root in ("", None)] == ["norm.weight"] * 2
    assert Nesting(gm, "layers.3").name_of(y.next) == y.next.name


def two_calls(*names: str) -> tuple[Nesting, fx.Node, fx.Node]:
    """Two calls of one region, traced once, with parameters of these names in two layers.

    Returns:
        A node of the body of each.
    """
    gm, first, body = nested(product, X, Y)
    again = nested(product, X, Y)[2]
    gm.add_submodule("body_2", again)
    x, _ = placeholders(gm.graph)
    with gm.graph.inserting_before(first):
        held = gm.graph.get_attr("body_2")
        second = gm.graph.call_function(first.target, (held, *first.args[1:]))
    for layer, call in enumerate((first, second)):
        weights = []
        for name in names:
            with gm.graph.inserting_before(x):
                weights.append(gm.graph.placeholder(f"weight_{layer}"))
            weights[-1].meta[INPUT] = (True, name.format(layer))
        call.args = (*call.args[:2], x, *weights)
    first.prepend(held)
    first.append(second)
    return Nesting(gm, ""), *(next(iter(b.graph.nodes)) for b in (body, again))


@pytest.mark.parametrize(
    "names",
    [("layers.{}.attn.qkv.weight",), ("layers.{}.attn.q.weight", "layers.{}.attn.k.weight")],
    ids=["one parameter", "several"],
)
def test_a_region_that_is_traced_once_is_named_by_whose_parameters_it_is_called_with(
    names: tuple[str, ...],
) -> None:
    nesting, in_first, in_second = two_calls(*names)
    for traced in ("layers.0.attn", "layers.0.attn.inner"):
        assert nesting.in_this_call(in_first, traced) == traced
        assert nesting.in_this_call(in_second, traced) == traced.replace("0", "1")
    assert nesting.in_this_call(in_second, "layers.01.attn") == "layers.01.attn"
    outside = nesting.outermost(in_first)
    assert nesting.in_this_call(outside, "layers.0.attn") == "layers.0.attn"
