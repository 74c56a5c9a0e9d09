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
from moonfx.passes.graph.nodes import argument, operator_name, permutation
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
from moonfx.site import Declined

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
        node: the product, or the division that ends the attention; the softmax where neither is
            known.
        value: its right operand.
        probabilities: the nodes from the softmax to the product's left operand, both included.
        product: the product, or None where `beyond` stands in its way.
        beyond: the first operator that is not read on a way to a product.
        heads: H where a view folds the heads into the batch, or None.
        sliced: what cuts columns off the probabilities, or None.
        guards: node of `probabilities` -> how it sets some of them to 0, or why that is no guard.
    """

    node: fx.Node
    value: fx.Node
    probabilities: list[fx.Node] = field(default_factory=list)
    product: fx.Node | None = None
    beyond: fx.Node | None = None
    heads: int | None = None
    sliced: fx.Node | None = None
    guards: dict[fx.Node, Guard | str] = field(default_factory=dict)

    @property
    def path(self) -> list[fx.Node]:
        """The nodes from the softmax to `node`, both included."""
        ends = [] if self.product is None else [self.product]
        return [*self.probabilities, *ends, *(n for n in [self.node] if n not in ends)]

    @property
    def proved_guards(self) -> list[Guard]:
        """The guards whose condition is one."""
        return [guard for guard in self.guards.values() if isinstance(guard, Guard)]


def product_of(softmax: Softmax, context: Context) -> Product | None:
    """The product that the softmax's result enters as left operand; None if there is none.

    Whether all on the way is plain attention is for `check_product` to say.
    """
    node = softmax.node
    found = Product(node, node)
    while True:
        found.probabilities.append(node)
        found.product = next((u for u in node.users if _enters(node, u)), None)
        if found.product is not None:
            break
        step = _next(node, found, context)
        if step is None:
            found.beyond = product_beyond(node, reaches_product(softmax.operand))
            return None if found.beyond is None else found
        if step.target in SLICES:
            found.sliced = step
        found.heads = folded_heads(step) or found.heads
        node = step
    if found.product.target in MATMUL:
        found.node, found.value = found.product, found.product.args[1]  # type: ignore[assignment]
        if softmax.total is not None and _is_divided(found.product, softmax.total):
            found.node = next(iter(found.product.users))
    return found


def _next(node: fx.Node, found: Product, context: Context) -> fx.Node | None:
    """The user that probabilities go on through; notes what kind of guard it is."""
    for user in node.users:
        guard = guard_of(user, node, context)
        if guard is not None:
            found.guards[user] = guard
        if guard is not None or _passes(user):
            return user
    return None


def _is_divided(product: fx.Node, total: fx.Node) -> bool:
    """Whether all that reads a product is its division by a total."""
    last = next(iter(product.users), None)
    divided = last is not None and last.target in DIVIDE and last.args == (product, total)
    return divided and len(product.users) == 1


def check_product(found: Product, softmax: Softmax) -> None:
    """Checks that nothing but the product with the values becomes of the probabilities.

    Raises:
        Declined: naming the first thing on the way that is not plain attention.
    """
    slices = 0
    steps = [*found.probabilities[1:], found.product]
    for node, step in zip(found.probabilities, steps, strict=True):
        if step is None:
            raise _beyond(found, softmax)
        _check_readers(node, step, found, softmax)
        if step.target in DROPOUT:
            p, train = argument(step, 1, "p"), argument(step, 2, "train")
            if train and p != 0.0:
                reason = f"dropout p={p} is active; set it to 0 or call eval()"
                raise Declined(reason, step, of_call=True)
        slices += step.target in SLICES
        if slices > 1:
            raise Declined("the probabilities are sliced twice", step)
    product, probabilities = found.product, found.probabilities[-1]
    assert product is not None
    if product.target is aten.einsum.default:
        raise Declined(f"einsum '{product.args[0]}' is not probabilities @ values", product)
    if found.value is probabilities:
        raise Declined("the probabilities are also the values", product)
    undivided = found.node is product or probabilities is not softmax.node
    if softmax.total is not None and undivided:
        raise Declined(_NOT_DIVIDED, product)


def _check_readers(node: fx.Node, step: fx.Node, found: Product, softmax: Softmax) -> None:
    """Probabilities are read by what comes next, and by what belongs to it."""
    guard = found.guards.get(step)
    if isinstance(guard, str):
        raise Declined(guard, step)
    own = softmax.inner | {step} | (set() if guard is None else guard.inner)
    others = [u for u in node.users if u not in own and u.target not in SHAPE_ONLY]
    if others:
        names = ", ".join(u.name for u in others)
        remedy = "call with output_attentions=False or need_weights=False"
        raise Declined(f"the probabilities are also used by {names}; {remedy}", node)


def _beyond(found: Product, softmax: Softmax) -> Declined:
    """Why the probabilities are not followed to a product that they enter."""
    assert found.beyond is not None
    far = found.beyond
    reason = f"'{operator_name(far)}' stands between the softmax and its product with the values"
    if far.target is DETACH:
        reason = "the probabilities are detached; take the detach() away"
    return Declined(_NOT_DIVIDED if softmax.total is not None else reason, far)


def _enters(node: fx.Node, product: fx.Node) -> bool:
    """Whether a node is the left operand of a product, summed over its last dim."""
    if product.target in MATMUL:
        return product.args[0] is node
    return einsum.contracts_keys(product, node)


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
