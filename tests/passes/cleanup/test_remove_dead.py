"""What a rewrite left without users goes, also out of bodies; what does something stays."""

import torch
from torch import Tensor, fx

from moonfx.capture.graph_nodes import placeholders
from moonfx.passes.cleanup import remove_dead
from moonfx.passes.context import Context
from moonfx.policy import LayerPolicy
from tests.support.bodies import nested
from tests.support.reading import returned, traced

X, Y = torch.arange(3.0), torch.ones(3)


def run(gm: fx.GraphModule) -> int:
    return remove_dead.run(gm.graph, Context(gm, lambda *given: LayerPolicy()))


def with_a_dead_mask() -> tuple[fx.GraphModule, fx.Node, fx.GraphModule]:
    """A body whose second input nobody reads any more, and a graph that still makes it."""
    gm, call, body = nested(lambda x, y: x * y, X, Y)
    (product,) = (n for n in body.graph.nodes if n.name == "mul")
    product.update_arg(1, product.args[0])
    mask = call.args[-1]
    with gm.graph.inserting_before(call):
        made = gm.graph.call_function(torch.ops.aten.exp.default, (mask,))
    made.meta["val"] = mask.meta["val"]
    call.update_arg(len(call.args) - 1, made)
    return gm, call, body


def test_an_operand_that_a_body_does_not_read_goes_with_the_nodes_that_made_it() -> None:
    gm, call, body = with_a_dead_mask()
    assert run(gm) == 1
    assert [n.name for n in placeholders(body.graph)] == ["x_1"]
    assert call.args[-1] is placeholders(gm.graph)[0]
    assert torch.ops.aten.exp.default not in [n.target for n in gm.graph.nodes]
    gm.graph.lint()
    assert len(placeholders(gm.graph)) == 2, "the graph is called as before"
    torch.testing.assert_close(body(X)[0] if isinstance(body(X), tuple) else body(X), X * X)


def test_the_second_time_there_is_nothing_to_remove() -> None:
    gm, _, _ = with_a_dead_mask()
    run(gm)
    before = str(gm.graph)
    assert run(gm) == 0
    assert str(gm.graph) == before


def test_what_writes_or_draws_stays() -> None:
    def writes(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        torch.rand_like(y)
        return y + 1

    gm = traced(writes, X, Y)
    with gm.graph.inserting_before(gm.graph.output_node()):
        dead = gm.graph.call_function(torch.ops.aten.exp.default, (returned(gm),))
    dead.meta["val"] = Y
    assert run(gm) == 1
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert "mul_" in names
    assert dead.name not in names


def test_a_body_that_writes_stays_though_nobody_reads_it() -> None:
    gm, call, _ = nested(lambda x, y: x.mul_(y), X, Y)
    output, x = gm.graph.output_node(), placeholders(gm.graph)[0]
    output.args = (x,)
    run(gm)
    assert call in gm.graph.nodes
    gm, call, _ = nested(lambda x, y: x * y, X, Y)
    gm.graph.output_node().args = (placeholders(gm.graph)[0],)
    run(gm)
    assert call.target not in [n.target for n in gm.graph.nodes]
