"""Sees attention that no pass looks into: in a branch of torch.cond, under vmap, on subclasses.

    before  cond(flag, true_graph, false_graph, x), with softmax(x @ x^T) @ x in true_graph
    after   the nodes in true_graph that look like attention; each becomes a declined site

What is done to tensors of a subclass stands in a captured graph as it was written, not in ATen.

Nothing is proved here: the worst that a wrong guess does is a row in the report.
"""

import torch
from torch import fx

from moonfx.capture.graph_nodes import is_higher_order
from moonfx.capture.sizes import is_plain

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "mm", "__matmul__")
_SOFTMAXES = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "exp")


def attentions_inside(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph that is not captured, torch functions or ATen, that look like attention.

    An operator for attention, or a product after a softmax after a product.
    """
    found: list[fx.Node] = []
    after: set[fx.Node] = set()  # a product came before
    weighted: set[fx.Node] = set()  # and a softmax after that
    for node in gm.graph.nodes:
        name = _plain_name(node)
        sources = set(node.all_input_nodes)
        if "scaled_dot_product" in name or "flex_attention" in name:
            found.append(node)
        elif name in _PRODUCTS:
            after.add(node)
            if sources & weighted:
                found.append(node)
        else:
            if sources & weighted or (name in _SOFTMAXES and sources & after):
                weighted.add(node)
            if sources & after:
                after.add(node)
        body = getattr(gm, str(node.target), None) if node.op in ("get_attr", "call_module") else 0
        if isinstance(body, fx.GraphModule):
            found += attentions_inside(body)
    return found


def attentions_on_subclasses(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """Attention on tensors of a subclass in a captured graph, and the subclass's name."""
    if not any(map(_is_as_written, gm.graph.nodes)):
        return []
    found = [n for n in attentions_inside(gm) if n.graph is gm.graph and _is_as_written(n)]
    return [(node, _subclass(node)) for node in found]


def _is_as_written(node: fx.Node) -> bool:
    """Whether a node is a call on a tensor of a subclass, which the capture leaves as it is."""
    if node.op == "call_method":
        return True
    ours = hasattr(node.target, "overloadpacket") or is_higher_order(node)
    return node.op == "call_function" and not ours and _subclass(node) != ""


def _subclass(node: fx.Node) -> str:
    """The name of the class of a node's result, "" if it is a plain tensor's or none."""
    value = node.meta.get("val")
    return type(value).__name__ if isinstance(value, torch.Tensor) and not is_plain(value) else ""


def _plain_name(node: fx.Node) -> str:
    """softmax, of torch.softmax, F.softmax, Tensor.softmax, nn.Softmax and aten.softmax.int."""
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", "")) if node.op == "call_function" else ""
