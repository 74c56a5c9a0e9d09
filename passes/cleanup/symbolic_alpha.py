"""Takes a number that is a symbol out of a sum's alpha.

before  p.add_(u, alpha=s)        s a learning rate that a scheduler changes
after   p.add_(u.to(p.dtype) * s)

What torch.compile makes of a symbol in a product is a tensor; of one in alpha it makes a constant,
and compiles the step anew at each change. The product is rounded on its own here.
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import dtype

aten = torch.ops.aten

_SUMS = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.sub_.Tensor,
}


def run(graph: fx.Graph, context: Context) -> int:
    """Returns how many sums it wrote anew; none of them counts as made sparse or faster."""
    found = [node for node in graph.nodes if node.target in _SUMS and _is_symbol(node)]
    for node in found:
        to: Any = node.args[0]
        given: Any = node.args[1]
        alpha = node.kwargs["alpha"]
        with graph.inserting_before(node):
            if dtype(given) is not dtype(to):
                cast = graph.call_function(aten.to.dtype, (given, dtype(to)))
                cast.meta.update(given.meta, val=given.meta["val"].to(dtype(to)))
                given = cast
            scaled = graph.call_function(aten.mul.Tensor, (given, alpha))
        scaled.meta.update(given.meta)
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
