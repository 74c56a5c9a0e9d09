"""Which nodes of a graph are written to in place, directly or through a view."""

import torch
from torch import fx

# Changes what autograd thinks of a tensor, never its values.
_HARMLESS = {torch.ops.aten.detach_.default}


def aliases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the node's result may share."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return []
    given = zip(schema.arguments, node.args, strict=False)
    return [a for s, a in given if s.alias_info is not None and isinstance(a, fx.Node)]


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target in _HARMLESS:
        return []
    return [
        value
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in [
            node.args[position]
            if position < len(node.args)
            else node.kwargs.get(argument.name)
        ]
        if isinstance(value, fx.Node)
    ]


def last_writes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each node whose memory is written to -> the position of the last operator that writes it."""
    base: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        sources = aliases(node)
        base[node] = base[sources[0]] if sources else node
        for source in sources[1:]:
            root = base[source]
            base.update({n: base[node] for n, b in base.items() if b is root})
        for target in writes(node):
            last[base[target]] = position
    return {node: last[root] for node, root in base.items() if root in last}
