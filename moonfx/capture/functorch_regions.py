"""Regions under torch.vmap or torch.func, each kept as one call that no pass looks into."""

import operator
from typing import Any

import torch
from torch import fx

_ORIGIN = ("nn_module_stack", "stack_trace")


class Region(torch.nn.Module):
    """A region of a graph as Dynamo wrote it; no child, for dead code is removed in children."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.held = (gm,)


@fx.node.has_side_effect  # unknown, for it is not looked into
def under_transform(region: Region, *operands: Any) -> Any:
    """Runs a region."""
    return region.held[0](*operands)


def isolate_transforms(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with each region under torch.vmap or torch.func as one call of a module.

    Such a region means something only as Dynamo wrote it: _vmap_increment_nesting(...), what runs
    on batched tensors, _vmap_decrement_nesting(). Make_fx would see through the batched tensors.
    """
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in gm.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        opens, closes = (name.endswith(f"_{x}_nesting") for x in ("increment", "decrement"))
        if opens and not depth:
            regions.append([])
        depth += opens
        if depth:
            regions[-1].append(node)
        depth -= closes
    if not regions:
        return gm
    gm = fx.GraphModule(gm, gm.graph)
    graph = fx.Graph()
    inside = {node: i for i, region in enumerate(regions) for node in region}
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node not in inside:
            made[node] = graph.node_copy(node, made.__getitem__)
        elif (region := regions[inside[node]])[-1] is node:
            _call_region(gm, graph, region, f"transformed_{inside[node]}", made)
    return fx.GraphModule(gm, graph)


def _call_region(
    gm: fx.GraphModule,
    graph: fx.Graph,
    region: list[fx.Node],
    name: str,
    made: dict[fx.Node, fx.Node],
) -> None:
    """Writes a call of a module that holds the region's nodes; its results go into `made`."""
    body, own = fx.Graph(), dict[fx.Node, fx.Node]()
    within = set(region)
    outside = dict.fromkeys(x for n in region for x in n.all_input_nodes if x not in within)
    for operand in outside:
        own[operand] = body.placeholder(operand.name)
    for node in region:
        own[node] = body.node_copy(node, own.__getitem__)
    results = [n for n in region if any(user not in within for user in n.users)]
    body.output(tuple(own[n] for n in results))
    gm.add_submodule(name, Region(fx.GraphModule(gm, body)))
    operands = (graph.get_attr(name), *(made[x] for x in outside))
    call = graph.call_function(under_transform, operands)
    call.meta.update({k: v for k, v in region[0].meta.items() if k in _ORIGIN})
    for i, node in enumerate(results):
        made[node] = graph.call_function(operator.getitem, (call, i))
        made[node].meta.update({k: v for k, v in node.meta.items() if k in _ORIGIN})
