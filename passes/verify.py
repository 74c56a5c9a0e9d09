"""Checks a graph's invariants after a pass: well formed, and rewritten sites as the policy says."""

import torch
from torch import fx

from moonfx.passes.context import Context


class InvalidGraph(Exception):
    """A pass broke the graph; a bug of moonfx, never of the user."""


def run(graph: fx.Graph, context: Context) -> int:
    """Returns 0.

    Raises:
        InvalidGraph: naming the node.
    """
    graph.lint()
    operator = torch.ops.moonfx.moba_attention.default
    for node in graph.nodes:
        if node.target is not operator:
            continue
        query, key, value = (node.args[i].meta["val"] for i in range(3))
        if not query.dim() == key.dim() == value.dim() == 4:
            raise InvalidGraph(f"{node.name}: operands are not [B, H, N, D]")
        if not query.dtype == key.dtype == value.dtype:
            raise InvalidGraph(f"{node.name}: operands differ in dtype")
        key_mask = node.args[7] if len(node.args) > 7 else None
        if isinstance(key_mask, fx.Node) and key_mask.meta["val"].dtype != torch.bool:
            raise InvalidGraph(f"{node.name}: key_mask is not bool")
    for site in context.sites:
        if site.action == "sparse" and site.output.graph is graph:
            before = site.output.meta["val"]
            users_alive = bool(site.output.users)
            if not users_alive or before.dim() not in (3, 4):
                raise InvalidGraph(f"{site.layer}: the rewritten output is not used")
    return 0
