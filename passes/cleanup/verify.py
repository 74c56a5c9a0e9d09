"""Checks a graph's invariants after a pass: well formed, and rewritten sites as the policy says.

Fake values, from which compilers take shapes and strides, are those that the operators compute.
"""

import torch
from torch import fx

from moonfx.capture.graph_nodes import is_higher_order
from moonfx.capture.sizes import fake_values
from moonfx.passes.attention.output_strides import rerun, same_layout
from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import writes
from moonfx.passes.graph.nodes import arguments_of

OPERATOR = torch.ops.moonfx.moba_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class InvalidGraph(Exception):
    """A pass broke the graph; a bug of moonfx, never of the user."""


def run(graph: fx.Graph, context: Context) -> int:
    """Returns 0.

    Raises:
        InvalidGraph: naming the node.
    """
    graph.lint()
    for node in graph.nodes:
        if node.target is not OPERATOR:
            continue
        given = arguments_of(node)
        query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
        if not query.dim() == key.dim() == value.dim() == 4:
            raise InvalidGraph(f"{node.name}: operands are not [B, H, N, D]")
        if not query.dtype == key.dtype == value.dtype:
            raise InvalidGraph(f"{node.name}: operands differ in dtype")
        key_mask = given["key_mask"]
        if isinstance(key_mask, fx.Node) and key_mask.meta["val"].dtype != torch.bool:
            raise InvalidGraph(f"{node.name}: key_mask is not bool")
    for site in context.sites:
        if site.action == "sparse" and site.output.graph is graph:
            before = site.output.meta["val"]
            users_alive = bool(site.output.users)
            if not users_alive or before.dim() not in (3, 4):
                raise InvalidGraph(f"{site.layer}: the rewritten output is not used")
    _fake_values_agree(graph, context)
    return 0


def _fake_values_agree(graph: fx.Graph, context: Context) -> None:
    """Runs what follows a rewritten attention on fake values again and compares.

    An attention that is not rewritten is let be: its strides depend on the kernel that is picked.
    """
    after: set[fx.Node] = set()
    with fake_values(context.gm):
        for node in graph.nodes:
            follows = any(n in after for n in node.all_input_nodes)
            if node.target is not OPERATOR and not follows:
                continue
            after.add(node)
            if node.op != "call_function" or is_higher_order(node) or writes(node):
                continue
            try:
                value = rerun(node, {}, context)
            except Exception as error:
                raise InvalidGraph(f"{node.name}: {error}") from error
            if node.target is not SDPA and not same_layout(value, node.meta["val"]):
                raise InvalidGraph(f"{node.name}: its shape, dtype or strides are out of date")
