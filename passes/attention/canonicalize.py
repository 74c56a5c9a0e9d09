"""Brings the many spellings of attention to one, so that matchers need not rewrite.

    before  einsum("bihd,bjhd->bhij", q, k)            after   matmul(permute(q), permute(k))
            scores - mask                                      scores + neg(mask)
            scores.mul_(0.125)                                 scores.mul(0.125)
            out, out_2 = flash(q, k, v)[0], the same[0]        out for both
            a value that nobody reads                          nothing

Each is legal wherever it stands, whether or not the attention becomes sparse: a product in the
order that einsum takes it in, all else the same numbers bit for bit. It is done around a softmax
alone, from query @ key^T to the product with the values. For a mask that the graph is given, whose
values are known, this also writes what the keys are by it: a proof names that node.
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.attention import einsum
from moonfx.passes.attention import fused_operators as fused
from moonfx.passes.attention.probabilities import product_of
from moonfx.passes.attention.softmax import read_softmax
from moonfx.passes.attention.subtracted_max import peak_of
from moonfx.passes.attention.upstream import reaches_product
from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import aliases, is_opaque
from moonfx.passes.graph.dead_code import remove_dead_code
from moonfx.passes.graph.nodes import dtype, insert
from moonfx.passes.graph.operators import (
    EXP,
    FILLS,
    IN_PLACE,
    PRODUCTS,
    SCORES_PASS,
    SHAPE_ONLY,
    SOFTMAX,
)
from moonfx.passes.graph.walks import upstream
from moonfx.passes.symbolic.input_masks import write_keys

aten = torch.ops.aten

_ADD: dict[object, Any] = {
    aten.sub.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.add_.Tensor,
}


def run(graph: fx.Graph, context: Context) -> int:
    """Returns how many nodes it wrote anew, dead ones apart."""
    remove_dead_code(graph)  # a dead reader of the probabilities is no reader
    written = 0
    for node in list(graph.nodes):
        if node.op == "placeholder":
            written += write_keys(node)
        elif node.op == "call_function" and fused.is_attention(node):
            written += _take_output_once(node)
        elif node.target in SOFTMAX | EXP:
            written += _around_softmax(node, context)
    if written:
        context.changed(graph)
    return written


def _take_output_once(node: fx.Node) -> int:
    """Joins the nodes that take the first of an operator's results."""
    first, *others = fused.first_results(node) or [node]
    for other in others:
        other.replace_all_uses_with(first)
        node.graph.erase_node(other)
    return len(others)


def _around_softmax(node: fx.Node, context: Context) -> int:
    """Of the scores and the product with the values of one softmax."""
    softmax = read_softmax(node)
    product = None if softmax is None else product_of(softmax, context)
    if softmax is None or product is None:
        return 0
    written = 0
    if product.product is not None and product.product.target is aten.einsum.default:
        written += einsum.as_output(product.product, product.probabilities[-1]) is not None
    steps = _scores_above(softmax.operand)
    products = [n for n in steps if n.target in PRODUCTS]
    for step in steps:
        if step.target is aten.einsum.default and len(products) == 1:
            written += einsum.as_scores(step) is not None
        if step.target in _ADD:
            written += _add_negative(step)
        if step.target in IN_PLACE:
            written += _out_of_place(step)
    return written


def _scores_above(operand: fx.Node) -> list[fx.Node]:
    """What may stand between query @ key^T and a softmax, products included, in order."""
    found = upstream(
        [operand],
        stop=lambda node: not (node.target in SCORES_PASS or node.target in PRODUCTS),
        inputs=lambda node: [] if node.target in PRODUCTS else node.all_input_nodes,
    )
    return sorted(n for n in found if reaches_product(n))


def _add_negative(node: fx.Node) -> bool:
    """scores - mask as scores + (-mask), unless what is subtracted is the scores' own maximum."""
    scores, mask = node.args[:2]
    if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
        return False
    if node.kwargs.get("alpha", 1) != 1 or peak_of(mask, scores) is not None:
        return False
    kind, to = dtype(mask), dtype(scores)
    if kind is None or to is None or kind.is_complex:
        return False
    if not reaches_product(scores) or reaches_product(mask):
        return False
    if not kind.is_floating_point:  # the negative of an integer may overflow
        mask = insert(aten.to.dtype, (mask, to), node)
    node.args = (scores, insert(aten.neg.default, (mask,), node))
    node.target = _ADD[node.target]
    return True


def _out_of_place(node: fx.Node) -> bool:
    """What happens in place on the scores as a result of its own, where nothing sees the write."""
    operands = [n.meta["val"] for n in node.all_input_nodes]
    kinds = {v.dtype for v in operands if isinstance(v, torch.Tensor) and v.dim()}
    promotes = node.target not in FILLS and kinds != {node.meta["val"].dtype}
    if promotes or not _is_private(node):
        return False
    node.target = IN_PLACE[node.target]
    return True


def _is_private(writer: fx.Node) -> bool:
    """Whether whoever reads the memory that a node writes to, later, reads it by its result."""
    link, source = writer, writer.args[0]
    while isinstance(source, fx.Node):
        if not all(u is link or _is_done(u, source, writer) for u in source.users):
            return False
        above = aliases(source)
        if not above:
            return source.op == "call_function" and hasattr(source.target, "_schema")
        if len(above) != 1:
            return False
        link, source = source, above[0]
    return False


def _is_done(user: fx.Node, source: fx.Node, writer: fx.Node) -> bool:
    """Whether a user of a tensor has read all that it will before another node writes."""
    if user.target in SHAPE_ONLY:
        return True
    if not user < writer or is_opaque(user):
        return False
    return source not in aliases(user) or all(_is_done(u, user, writer) for u in user.users)
