"""Follows the probabilities from the softmax to their product with the values.

softmax -> {cast, inactive dropout, view of the heads, NaN guard, sink logits cut off}*
        -> (matmul | bmm | einsum)(., value) -> division by the sum, where softmax left that out
"""

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.attention import einsum
from moonfx.passes.attention.heads import folded_heads, views_itself
from moonfx.passes.attention.nan_guards import Guard, guard_of
from moonfx.passes.attention.softmax import Softmax
from moonfx.passes.attention.upstream import reaches_product
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import argument, permutation
from moonfx.passes.graph.nodes import operator_name as short
from moonfx.passes.graph.operators import (
    CASTS,
    COPIES,
    DETACH,
    DIVIDE,
    DROPOUT,
    FAR,
    FOLDS,
    MATMUL,
    PRODUCTS,
    SCORES_PASS,
    SHAPE_ONLY,
    SLICES,
)
from moonfx.site import Reject

aten = torch.ops.aten

_RESHAPED = {DETACH, aten.expand.default, aten.constant_pad_nd.default, aten.pad.default}
# What takes a tensor apart into several.
_APART = {
    operator.getitem,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}
_NOT_DIVIDED = (
    "a softmax written with exp() and a sum is not read, as the product with the values is not "
    "divided by that sum: write softmax()"
)


@dataclass
class Product:
    """probabilities @ value.

    Args:
        node: the product, or the division that ends the attention.
        heads: H where a view folds the heads into the batch, or None.
        sliced: what cuts columns off the probabilities, or None.
        guards: what sets some of the probabilities to 0.
        path: the nodes from the softmax to the product, both included.
        reject: why it is not plain attention, or None.
    """

    node: fx.Node
    value: fx.Node
    heads: int | None = None
    sliced: fx.Node | None = None
    guards: list[Guard] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)
    reject: Reject | None = None

    def refuse(self, reason: str, node: fx.Node) -> None:
        """Keeps the first reason."""
        self.reject = self.reject or Reject(reason, node)


def product_of(softmax: Softmax, context: Context) -> Product | None:
    """The product that the softmax's result enters as left operand; None if there is none."""
    node = softmax.node
    found = Product(node, node)
    while True:
        found.path.append(node)
        product = next((u for u in node.users if _enters(node, u)), None)
        step, guard = product, None
        for user in [] if product is not None else node.users:
            guard = guard_of(user, node, context)
            if guard is not None or _passes(user):
                step = user
                break
        if step is None:
            far = product_beyond(node, reaches_product(softmax.operand))
            if far is None:
                return None
            reason = f"'{short(far)}' stands between the softmax and its product with the values"
            if far.target is DETACH:
                reason = "the probabilities are detached; take the detach() away"
            if softmax.total is not None:
                reason = _NOT_DIVIDED
            found.refuse(reason, far)
            return found
        if isinstance(guard, str):
            found.refuse(guard, step)
        elif guard is not None:
            found.guards.append(guard)
        own = softmax.inner | (guard.inner if isinstance(guard, Guard) else set())
        others = [
            u for u in node.users if u is not step and u not in own and u.target not in SHAPE_ONLY
        ]
        if others:
            names = ", ".join(u.name for u in others)
            remedy = "call with output_attentions=False or need_weights=False"
            found.refuse(f"the probabilities are also used by {names}; {remedy}", node)
        if step is product:
            break
        if step.target in DROPOUT:
            p, train = argument(step, 1, "p"), argument(step, 2, "train")
            if train and p != 0.0:
                found.refuse(f"dropout p={p} is active; set it to 0 or call eval()", step)
        if step.target in SLICES:
            if found.sliced is not None:
                found.refuse("the probabilities are sliced twice", step)
            found.sliced = step
        found.heads = folded_heads(step) or found.heads
        node = step
    assert product is not None
    return _ended(found, product, softmax, context)


def _ended(found: Product, product: fx.Node, softmax: Softmax, context: Context) -> Product:
    """Takes the values from the product, and the division by the sum if it is still to come."""
    probabilities, total = found.path[-1], softmax.total
    if product.target is aten.einsum.default:
        equation = product.args[0]
        plain = einsum.as_output(product, probabilities)
        if plain is None:
            found.refuse(f"einsum '{equation}' is not probabilities @ values", product)
            return found
        context.changed(plain.graph)
        product = plain
    found.node, found.value = product, product.args[1]  # type: ignore[assignment]
    found.path.append(product)
    if found.value is probabilities:
        found.refuse("the probabilities are also the values", product)
    if total is not None:
        last = next(iter(product.users), None)
        divided = last is not None and last.target in DIVIDE and last.args == (product, total)
        if not divided or len(product.users) > 1 or probabilities is not softmax.node:
            found.refuse(_NOT_DIVIDED, product)
        else:
            found.node = last  # type: ignore[assignment]
            found.path.append(found.node)
    return found


def _enters(node: fx.Node, product: fx.Node) -> bool:
    """Whether a node is the left operand of a product, summed over its last dim."""
    if product.target in MATMUL:
        return product.args[0] is node
    return einsum.takes(product, node)


def _passes(node: fx.Node) -> bool:
    if node.target in FOLDS:
        return views_itself(node) or folded_heads(node) is not None
    if node.target in SLICES:
        rank = len(node.meta["val"].shape)
        return int(argument(node, 1, "dim", 0)) % rank == rank - 1
    if node.target in CASTS:
        return bool(node.meta["val"].dtype.is_floating_point)
    return node.target in COPIES | DROPOUT


def product_beyond(node: fx.Node, attention: bool = False) -> fx.Node | None:
    """The first operator in the way, if a path of elementwise operators leads to a product.

    Args:
        node: a softmax, or what is made of it.
        attention: whether the softmax is known to be over query @ key^T. Then any operator that
            keeps queries and keys as dims may stand in the way: a convolution over heads, a power.
    """
    through = SCORES_PASS | DROPOUT | SLICES | _RESHAPED | _APART
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
            kept = attention and _keeps_queries_and_keys(current, node)
            if kept or current.target in through or permutation(current) is not None:
                stack.extend(current.users)
    return None


def _keeps_queries_and_keys(current: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor has, among its dims, the last two of a node: as many queries, and keys."""
    here, there = (getattr(n.meta.get("val"), "shape", ()) for n in (current, node))
    rest = list(here)
    for size in there[-2:]:
        same = next((i for i, other in enumerate(rest) if same_size(other, size)), None)
        if same is None:
            return False
        del rest[same]
    return len(here) > 2
