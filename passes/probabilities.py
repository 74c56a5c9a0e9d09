"""Follows the probabilities from the softmax to their product with the values.

softmax -> {cast, inactive dropout, view of the heads}* -> (matmul | bmm | einsum)(., value)
"""

from dataclasses import dataclass

import torch
from torch import fx

from moonfx.passes import einsum
from moonfx.passes.context import Context
from moonfx.passes.groups import COPIES, FOLDS, folded_heads
from moonfx.passes.nodes import argument, permutation
from moonfx.passes.scores import CASTS, FAR, MATMUL, PRODUCTS, SCORES_PASS, short
from moonfx.site import Reject

aten = torch.ops.aten

DROPOUT = {aten.dropout.default}
DETACH = aten.detach.default


@dataclass
class Product:
    """probabilities @ value.

    Args:
        node: the product.
        heads: H where a view folds the heads into the batch, or None.
        reject: why it is not plain attention, or None.
    """

    node: fx.Node
    value: fx.Node
    heads: int | None = None
    reject: Reject | None = None


def product_of(softmax: fx.Node, context: Context) -> Product | None:
    """The product that the softmax's result enters as left operand; None if there is none."""
    node, heads = softmax, None
    reject: Reject | None = None
    while True:
        product = next((u for u in node.users if _probabilities(u) is node), None)
        step = product or next((u for u in node.users if _passes(u)), None)
        if step is None:
            far = product_beyond(node)
            if far is None:
                return None
            reason = f"'{short(far)}' stands between the softmax and its product with the values"
            if far.target is DETACH:
                reason = "the probabilities are detached"
            return Product(node, node, None, reject or Reject(reason, far))
        if len(node.users) > 1 and reject is None:
            names = ", ".join(u.name for u in node.users if u is not step)
            reject = Reject(f"the probabilities are also used by {names}", node)
        if step is product:
            break
        if step.target in DROPOUT:
            p, train = argument(step, 1, "p"), argument(step, 2, "train")
            if train and p != 0.0 and reject is None:
                reject = Reject(f"dropout p={p} is active; set it to 0 or call eval()", step)
        heads = folded_heads(step) or heads
        node = step
    if product.target is aten.einsum.default:
        equation = product.args[0]
        plain = einsum.as_output(product, node)
        if plain is None:
            reason = f"einsum '{equation}' is not probabilities @ values"
            return Product(product, node, heads, reject or Reject(reason, product))
        context.changed(plain.graph)
        product = plain
    value = product.args[1]
    assert isinstance(value, fx.Node)
    if value is node and reject is None:
        reject = Reject("the probabilities are also the values", product)
    return Product(product, value, heads, reject)


def _probabilities(node: fx.Node) -> fx.Node | None:
    """The operand of a product with the values that the probabilities can be."""
    if node.target in MATMUL:
        return node.args[0]  # type: ignore[return-value]
    if (parts := einsum.subscripts(node)) is not None:
        left, right, result = parts
        first, second = einsum.operands(node)
        return first if left[-1] not in result else second if right[-1] not in result else None
    return None


def _passes(node: fx.Node) -> bool:
    if node.target in FOLDS:
        return folded_heads(node) is not None
    return node.target in CASTS | COPIES | DROPOUT


def product_beyond(node: fx.Node) -> fx.Node | None:
    """The first operator in the way, if an elementwise path leads from node to a product."""
    through = SCORES_PASS | DROPOUT | {DETACH, aten.slice.Tensor, aten.expand.default}
    for user in node.users:
        stack = [user]
        seen: set[fx.Node] = set()
        while stack and len(seen) < FAR:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.target in PRODUCTS:
                return user
            if current.target in through or permutation(current) is not None:
                stack.extend(current.users)
    return None
