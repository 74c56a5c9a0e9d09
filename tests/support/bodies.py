"""Graphs that call bodies, as torch.export and Dynamo write them."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap

from moonfx.capture.graph_nodes import CAPTURED, placeholders
from tests.support.reading import traced

# What stands before the body among the arguments, and what between it and the operands.
OPERATORS: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {
    "wrap": (wrap, (), ()),
    "checkpoint": (tag_activation_checkpoint, (), ()),
    "region": (torch.ops.higher_order.invoke_subgraph, (), ("name",)),
    "no_grad": (torch.ops.higher_order.wrap_with_set_grad_enabled, (False,), ()),
}


def nested(
    run: Callable[..., Any], *given: Tensor, by: str = "region", captured: bool = True
) -> tuple[fx.GraphModule, fx.Node, fx.GraphModule]:
    """A graph that returns the first result of a body, which it calls with its own inputs.

    Returns:
        The graph, the node that calls, and the body.
    """
    body = traced(run, *given)
    body.meta[CAPTURED] = captured
    target, before, between = OPERATORS[by]
    graph = fx.Graph()
    inputs = []
    for inside in placeholders(body.graph):
        inputs.append(graph.placeholder(f"outer_{inside.name}"))
        inputs[-1].meta["val"] = inside.meta["val"]
    held = graph.get_attr("body")
    call = graph.call_function(target, (*before, held, *between, *inputs))
    results = body.graph.output_node().all_input_nodes
    call.meta["val"] = tuple(n.meta["val"] for n in results)
    first = graph.call_function(operator.getitem, (call, 0))
    first.meta["val"] = results[0].meta["val"]
    graph.output(first)
    gm = fx.GraphModule({"body": body}, graph)
    gm.meta[CAPTURED] = True
    return gm, call, body
