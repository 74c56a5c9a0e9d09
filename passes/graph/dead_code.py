"""Removes nodes that nobody reads and that do nothing else."""

import torch
from torch import fx

from moonfx.capture.graph_nodes import is_higher_order
from moonfx.passes.graph.aliases import is_opaque, made_in_place, writes
from moonfx.passes.graph.nodes import argument, body_of

aten = torch.ops.aten


def _draws_nothing(node: fx.Node) -> bool:
    """Whether a dropout, or attention with one, is inactive: no random number is drawn."""
    if node.target is aten.dropout.default:
        return not argument(node, 2, "train") or argument(node, 1, "p") == 0.0
    if node.target is aten.scaled_dot_product_attention.default:
        return argument(node, 4, "dropout_p", 0.0) == 0.0
    return False


def remove_dead_code(graph: fx.Graph) -> None:
    """Removes nodes that nobody reads and that do nothing else, in this graph alone.

    Graph.eliminate_dead_code keeps what works in place or may draw a random number, and so the
    dense scores above an inactive dropout; and it drops methods of tensor subclasses that write,
    and in bodies that other nodes call whatever it knows nothing of.
    """
    settled: set[fx.Node] = set()
    for node in graph.nodes:
        settled.update(made_in_place(node, settled))
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in settled or _draws_nothing(node) or not _is_impure(node)):
            graph.erase_node(node)


def _is_impure(node: fx.Node) -> bool:
    """Whether a node may do something beside its result."""
    if node.is_impure() or writes(node):
        return True
    if node.op == "call_function" and is_higher_order(node):
        body = body_of(node)
        return body is not None and any(_has_effects(inner) for inner in body.graph.nodes)
    return is_opaque(node)


def _has_effects(node: fx.Node) -> bool:
    return (
        node.op not in ("placeholder", "output") and not _draws_nothing(node) and _is_impure(node)
    )
