"""Replaces a sum's alpha that is a symbol by a product.

before  p.add_(u, alpha=s)        s a learning rate that a scheduler changes
after   p.add_(u.to(p.dtype) * s)

torch.compile makes a tensor of a symbol in a product. Of one in alpha it makes a constant, and so
compiles the step again at each change. The product is rounded before it is added here.
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import dtype, insert
from moonfx.passes.graph.operators import ADD, SUBTRACT

aten = torch.ops.aten


def run(graph: fx.Graph, context: Context) -> int:
    """Returns how many sums it changed; none of them counts as made sparse or faster."""
    found = [node for node in graph.nodes if node.target in ADD | SUBTRACT and _is_symbol(node)]
    for node in found:
        to: Any = node.args[0]
        given: Any = node.args[1]
        alpha = node.kwargs["alpha"]
        if dtype(given) is not dtype(to):
            given = insert(aten.to.dtype, (given, dtype(to)), node)
        scaled = insert(aten.mul.Tensor, (given, alpha), node, value=given.meta["val"])
        node.args, node.kwargs = (to, scaled), {}
    if found:
        context.changed(graph)
    return len(found)


def _is_symbol(node: fx.Node) -> bool:
    """Whether alpha is a float that is not known, and no precision is lost by the product."""
    alpha = node.kwargs.get("alpha")
    if not isinstance(alpha, fx.Node) or not isinstance(alpha.meta.get("val"), torch.SymFloat):
        return False
    operands = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    if len(operands) != 2:
        return False
    to, given = map(dtype, operands)
    wide = to in (torch.float32, torch.float64) and dtype(node) is to
    return wide and given in (to, torch.bfloat16, torch.float16)
