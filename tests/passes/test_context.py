"""What the passes share of a graph, and that it is known anew once a pass has changed it."""

import gc
import weakref

import torch
from torch import Tensor, fx

from moonfx.passes.context import Context
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite, Declined
from tests.support.bodies import nested
from tests.support.reading import returned, traced

X, Y = torch.ones(3), torch.ones(3)


def context_of(gm: fx.GraphModule) -> Context:
    return Context(gm, lambda *given: LayerPolicy())


def site(node: fx.Node, **fields: fx.Node) -> AttentionSite:
    return AttentionSite(
        node, **{"query": node, "key": node, "value": node, **fields}, form="", layer="", line=""
    )


def test_a_body_runs_under_the_mode_of_its_call() -> None:
    gm, _, body = nested(lambda x, y: x * y, X, Y, by="no_grad")
    context = context_of(gm)
    assert context.mode(returned(gm)).gradients
    assert not context.mode(returned(body)).gradients
    assert not context.real(site(returned(body))).ends(returned(body))
    with torch.no_grad():
        assert not context_of(gm).mode(returned(gm)).gradients


def test_a_node_that_a_pass_inserts_has_a_mode() -> None:
    gm = traced(lambda x: x * 2, X)
    context = context_of(gm)
    assert context.mode(returned(gm)).gradients
    with gm.graph.inserting_before(returned(gm)):
        new = gm.graph.call_function(torch.ops.aten.neg.default, (returned(gm).args[0],))
    context.changed(gm.graph)
    assert context.mode(new).gradients


def test_what_is_written_is_known_anew_after_a_change() -> None:
    gm = traced(lambda x, y: (x.mul_(y), x + 1)[1], X, Y)
    context = context_of(gm)
    x = next(iter(gm.graph.nodes))
    assert context.mutated(x)
    (write,) = (n for n in gm.graph.nodes if n.name == "mul_")
    write.replace_all_uses_with(x)
    gm.graph.erase_node(write)
    assert context.mutated(x), "nobody has said so"
    context.changed(gm.graph)
    assert not context.mutated(x)


def test_sites_follow_what_replaces_their_operands() -> None:
    gm = traced(lambda x, y: (x * 2 + y, y * 2)[0], X, Y)
    x, y = (n for n in gm.graph.nodes if n.op == "placeholder")
    output = returned(gm)
    context = context_of(gm)
    context.sites = [site(output, query=x, key=y), site(output, query=y)]
    reader = next(iter(x.users))
    context.replaced(x, y, but=[reader])
    assert [(s.query, s.key) for s in context.sites] == [(y, y), (y, output)]
    assert reader.args[0] is x


def test_a_reason_keeps_no_graph_alive() -> None:
    """Its traceback would, and the graph every parameter."""
    gm = traced(lambda x: x * 2, X)
    found = site(returned(gm))
    context = context_of(gm)

    class Held(Tensor):
        pass

    def fails() -> None:
        held = X.as_subclass(Held)
        watch.append(weakref.ref(held))
        raise Declined("a reason", returned(gm))

    watch: list[weakref.ref[Held]] = []
    try:
        fails()
    except Declined as reason:
        context.decline(found, reason)
    gc.collect()
    assert watch[0]() is None
    assert (found.action, str(found.reject)) == ("declined", f"a reason (node {returned(gm).name})")
