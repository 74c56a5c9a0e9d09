"""Removes what a rewrite left without users: mask nodes, and operands of nested bodies.

before  body(x, mask) whose mask placeholder has no users
after   body(x), and the nodes that made the mask are gone
"""

from torch import fx

from moonfx.capture.graph_nodes import placeholders
from moonfx.passes.context import Context
from moonfx.passes.graph.dead_code import remove_dead_code
from moonfx.passes.graph.nodes import body_of, operands_of, set_operands


def run(graph: fx.Graph, context: Context) -> int:
    """Removes dead nodes of the graph and of the bodies it calls; returns how many."""
    before = len(graph.nodes)
    for node in list(graph.nodes):
        body = body_of(node)
        if body is None:
            continue
        run(body.graph, context)
        inputs = placeholders(body.graph)
        used = [bool(p.users) for p in inputs]
        kept = [a for a, u in zip(operands_of(node), used, strict=True) if u]
        set_operands(node, kept)
        for placeholder, keep in zip(inputs, used, strict=True):
            if not keep:
                body.graph.erase_node(placeholder)
        body.recompile()
        context.changed(body.graph)
    remove_dead_code(graph)
    return before - len(graph.nodes)
