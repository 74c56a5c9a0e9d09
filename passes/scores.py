"""The grammar between query @ key^T and the softmax, walked from the softmax back.

(matmul | bmm | baddbmm | einsum)(query, key^T)
    -> {mul | div by a scalar, add mask, where, masked_fill, view of the heads}*
    -> softmax
"""

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.passes import einsum
from moonfx.passes.context import Context
from moonfx.passes.expressions import MASKED_BELOW
from moonfx.passes.groups import COPIES, FOLDS, folded_heads
from moonfx.passes.nodes import permutation
from moonfx.site import Reject

aten = torch.ops.aten

MATMUL = {aten.matmul.default, aten.bmm.default}
PRODUCTS = MATMUL | {aten.baddbmm.default, aten.einsum.default}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
# In place on the scores is the same as out of place, as long as nobody else reads them.
IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
}
ADD = {aten.add.Tensor, aten.add_.Tensor}
MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
MASKED_FILL = {
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
}
_SHAPE_ONLY = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.sym_size.int,
}
_FILLS = {aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}
# Between softmax and scores; the last two only to be declined by name.
_ELEMENTWISE = CASTS | COPIES | FOLDS | MULTIPLY | DIVIDE | ADD | WHERE | MASKED_FILL
SCORES_PASS = _ELEMENTWISE | {aten.tanh.default, aten.sub.Tensor}

FAR = 64  # nodes


@dataclass
class Scores:
    """What stands before the softmax.

    Args:
        node: query @ key^T.
        masks, scale, factors: as in AttentionSite.
        path: the nodes from the softmax's operand to `node`, both included.
        heads: H where a view folds the heads into the batch, or None.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    form: str
    scale: float = 1.0
    masks: list[tuple[fx.Node, str]] = field(default_factory=list)
    factors: list[tuple[fx.Node, str]] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)
    heads: int | None = None


class _Walk:
    """What was met on the way from the softmax back to the product."""

    def __init__(self, start: fx.Node, context: Context) -> None:
        self.start, self.context = start, context
        self.scale = 1.0
        self.masks: list[tuple[fx.Node, str]] = []
        self.factors: list[tuple[fx.Node, str]] = []
        self.path: list[fx.Node] = []
        self.heads: int | None = None

    def arrived(self, node: fx.Node, query: Any, key: Any, form: str) -> Scores:
        return Scores(
            node, query, key, form, self.scale, self.masks, self.factors, self.path, self.heads
        )

    def reject(self, node: fx.Node, reason: str) -> Reject | None:
        """A Reject if the softmax is over a product of tensors at all, else None: no attention."""
        return Reject(reason, node) if _after_product(self.start) else None

    def hides(self, value: object) -> bool:
        """Whether a fill value makes a score vanish, scaled as it will be."""
        found = constant_of(value, self.context)
        return found is not None and not self.factors and found * self.scale <= MASKED_BELOW

    def add_mask(self, node: fx.Node) -> bool:
        """Takes an additive mask; False if it is scaled down before the softmax."""
        self.masks.append((node, "additive"))
        return not self.factors and self.scale >= 1.0


Step = fx.Node | Scores | Reject | None


def parse_scores(start: Any, context: Context) -> Scores | Reject | None:
    """Walks from the softmax back to query @ key^T; None if no such product is there at all."""
    step: Step = start
    if not isinstance(start, fx.Node):
        return None
    walk = _Walk(start, context)
    while isinstance(step, fx.Node):
        walk.path.append(step)
        step = _step(step, walk)
    return step


def _step(node: fx.Node, walk: _Walk) -> Step:
    target = node.target
    if target in PRODUCTS:
        return _product(node, walk)
    if target in CASTS | COPIES:
        if not node.meta["val"].dtype.is_floating_point:
            return Reject("the scores are cast to integers", node)
        return node.args[0]  # type: ignore[return-value]
    if target in FOLDS and (heads := folded_heads(node)) is not None:
        if walk.heads not in (None, heads):
            return Reject("the heads are folded into the batch in two ways", node)
        walk.heads = heads
        return node.args[0]  # type: ignore[return-value]
    if target in MULTIPLY | DIVIDE:
        return _scaled(node, walk)
    if target in ADD:
        return _added(node, walk)
    if target in WHERE:
        condition, yes, no = node.args
        if reaches_product(yes) and walk.hides(no):
            walk.masks.append((condition, "keep"))  # type: ignore[arg-type]
            return yes  # type: ignore[return-value]
        if reaches_product(no) and walk.hides(yes):
            walk.masks.append((condition, "drop"))  # type: ignore[arg-type]
            return no  # type: ignore[return-value]
        return walk.reject(node, "where() fills in a value that is no mask")
    if target in MASKED_FILL:
        if not walk.hides(node.args[2]):
            return walk.reject(node, "masked_fill() with a value that is no mask")
        walk.masks.append((node.args[1], "drop"))  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    if target is aten.tanh.default:
        return walk.reject(node, "softcap (tanh) stands between query @ key^T and the softmax")
    if sinks := _joined_to_scores(node):
        return walk.reject(sinks, "attention sink logits are joined to the scores (cat)")
    return walk.reject(node, f"'{short(node)}' stands between query @ key^T and the softmax")


def _joined_to_scores(node: fx.Node) -> fx.Node | None:
    """A cat of query @ key^T with something else, at the node or behind elementwise operators."""
    while node.target is not aten.cat.default:
        source = node.args[0] if node.target in SCORES_PASS else None
        if not isinstance(source, fx.Node):
            return None
        node = source
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    return node if any(map(reaches_product, parts)) else None


def _scaled(node: fx.Node, walk: _Walk) -> Step:
    source, given = node.args[:2]
    multiply = node.target in MULTIPLY
    if multiply and not reaches_product(source):
        source, given = given, source
    factor = constant_of(given, walk.context)
    if factor is not None:
        if not 0 < factor < float("inf"):
            return walk.reject(node, f"the scores are scaled by {factor}")
        walk.scale = walk.scale * factor if multiply else walk.scale / factor
    elif isinstance(given, fx.Node) and _is_scalar(given):
        walk.factors.append((given, "mul" if multiply else "div"))
    else:
        return walk.reject(node, "the scores are scaled by a tensor")
    return source  # type: ignore[return-value]


def _added(node: fx.Node, walk: _Walk) -> Step:
    if node.kwargs.get("alpha", 1) != 1:
        return walk.reject(node, "the mask is added with alpha != 1")
    left, right = node.args[:2]
    from_scores = [s for s in (left, right) if reaches_product(s)]
    if not from_scores:
        return walk.reject(node, "a sum that is no mask over scores")
    if len(from_scores) == 2:
        return Reject("additive bias: two products are added before the softmax", node)
    other = right if from_scores[0] is left else left
    # softmax(x + constant) == softmax(x)
    if isinstance(other, fx.Node) and not walk.add_mask(other):
        return walk.reject(node, "the mask is scaled after it was added")
    return from_scores[0]  # type: ignore[return-value]


def _product(node: fx.Node, walk: _Walk) -> Step:
    form = short(node)
    if node.target is aten.einsum.default:
        product = einsum.as_scores(node)
        if product is None:
            return Reject(f"einsum '{node.args[0]}' is not query @ key^T", node)
        walk.context.changed(product.graph)
        walk.path[-1] = node = product
    if node.target is not aten.baddbmm.default:
        query, key = node.args[:2]
        return walk.arrived(node, query, key, form)
    added, query, key = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float) or not alpha > 0:
        return Reject(f"the scores are scaled by {alpha}", node)
    if beta != 0:
        if beta != 1:
            return Reject(f"the mask is added with beta={beta}", node)
        if not walk.add_mask(added):  # type: ignore[arg-type]
            return Reject("the mask is scaled after it was added", node)
    walk.scale *= alpha
    return walk.arrived(node, query, key, form)


def constant_of(value: object, context: Context) -> float | None:
    """A scalar that the graph itself fixes, or the one value of all of a tensor, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        rank = len(held.shape) if isinstance(held, torch.Tensor) else 0
        index = [sympy.Dummy(integer=True, nonnegative=True) for _ in range(rank)]
        found = context.reader.broadcast(value, index)
        if getattr(found, "is_number", False) and found.is_extended_real:
            return float(found)
    return None


def _is_scalar(value: fx.Node) -> bool:
    """A tensor or a symbolic number that holds one value for all heads and positions."""
    held = value.meta.get("val")
    return held.dim() == 0 if isinstance(held, torch.Tensor) else held is not None


def reaches_product(node: object) -> bool:
    """Whether a node is query @ key^T behind elementwise operators, seen from the softmax."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            return len(node.meta["val"].shape) >= 3
        if node.target in SCORES_PASS:
            stack.extend(node.args)
    return False


def _after_product(start: fx.Node) -> bool:
    """Whether a product of tensors lies anywhere near above the softmax."""
    upstream = [start]
    seen: set[fx.Node] = set()
    while upstream:
        current = upstream.pop()
        if current in seen or len(seen) > FAR:
            continue
        seen.add(current)
        if current.target in PRODUCTS:
            return True
        upstream.extend(current.all_input_nodes)
    return False


def short(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def used_elsewhere(scores: Scores) -> Reject | None:
    """Scores or anything between them and the softmax that has a second user."""
    for node in scores.path:
        users = [u for u in node.users if u.target not in _SHAPE_ONLY]
        if len(users) > 1:
            names = ", ".join(u.name for u in users)
            return Reject(f"the scores are used more than once, by {names}", node)
    return None


def out_of_place(scores: Scores, context: Context) -> None:
    """Writes what happens in place on the scores as a result of its own, which can die.

    Only after `used_elsewhere`: nothing but the next node of the path sees the difference.
    """
    for node in scores.path:
        operands = [n.meta["val"] for n in node.all_input_nodes]
        kinds = {v.dtype for v in operands if isinstance(v, torch.Tensor) and v.dim()}
        promotes = node.target not in _FILLS and kinds != {node.meta["val"].dtype}
        if node.target in IN_PLACE and not promotes:
            node.target = IN_PLACE[node.target]
            context.changed(node.graph)


def token_major(key: fx.Node) -> Reject | None:
    """Checks that key^T was made from keys [.., N, D], features last.

    The composed permutation of key^T must put a source dim before the feature dim last; without a
    transpose the product could be query @ weights of the same shape by coincidence of sizes.
    """
    rank = len(key.meta["val"].shape)
    order, node = list(range(rank)), key
    while True:
        step = permutation(node)
        if step is not None:
            order = [step[d] for d in order]
        elif node.target not in CASTS | COPIES | MULTIPLY | DIVIDE:
            break
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        same = [a for a in operands if len(a.meta["val"].shape) == rank]
        if len(same) != 1 and step is None and node.target in MULTIPLY | DIVIDE:
            break
        node = same[0]
    if order[-1] < order[-2]:
        return None
    return Reject("the keys are not transposed: their last dim is not proved to be tokens", key)
