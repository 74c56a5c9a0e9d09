"""The grammar between query @ key^T and the softmax, walked from the softmax back.

(matmul | bmm | baddbmm | einsum)(query, key^T)
    -> {mul | div by a scalar}* -> softcap?
    -> {mul | div by a scalar, add or subtract a mask, where, masked_fill, view of the heads}*
    -> cat of sink logits? -> {subtract the maximum, clamp far out}*
    -> softmax

What softmax does not see (a constant, the maximum of each query) is passed over only where nothing
but softmax comes after it: a softcap or sink logits do see it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moonfx.passes.attention import einsum
from moonfx.passes.attention.heads import folded_heads, views_itself
from moonfx.passes.attention.sink_logits import Sink, join_of
from moonfx.passes.attention.subtracted_max import peak_of
from moonfx.passes.attention.upstream import (
    constant_of,
    is_scalar,
    product_above,
    reaches_product,
)
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import argument, operator_name
from moonfx.passes.graph.operators import (
    ADD,
    CASTS,
    CLAMP,
    COPIES,
    DISTANCES,
    DIVIDE,
    FOLDS,
    MASKED_FILL,
    MULTIPLY,
    PRODUCTS,
    SUBTRACT,
    TANH,
    WHERE,
)
from moonfx.passes.symbolic.expressions import MASKED_BELOW
from moonfx.site import Declined

aten = torch.ops.aten
SCALED_LATE = "the mask is scaled after it was added; scale the scores first"


@dataclass
class Scores:
    """What stands before the softmax.

    Args:
        node: query @ key^T.
        masks, fills, scale, factors, softcap: as in AttentionSite.
        sink: sink logits joined to the scores, or None.
        path: the nodes from the softmax's operand to `node`, both included.
        inner: other nodes that only the softmax's operand needs, as the maximum of the scores.
        heads: H where a view folds the heads into the batch, or None.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    form: str
    scale: float = 1.0
    softcap: float = 0.0
    sink: Sink | None = None
    masks: list[tuple[fx.Node, str]] = field(default_factory=list)
    mask_scales: dict[fx.Node, float] = field(default_factory=dict)
    fills: dict[fx.Node, float] = field(default_factory=dict)
    factors: list[tuple[fx.Node, str]] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)
    inner: set[fx.Node] = field(default_factory=set)
    heads: int | None = None


class _Walk:
    """What was met on the way from the softmax back to the product.

    `scale` and `factors` are what the scores at this place are still multiplied by.
    """

    def __init__(self, start: fx.Node, context: Context, exact: bool) -> None:
        self.start, self.context = start, context
        self.scale = 1.0
        self.softcap = 0.0
        self.sink: Sink | None = None
        self.masks: list[tuple[fx.Node, str]] = []
        self.mask_scales: dict[fx.Node, float] = {}
        self.fills: dict[fx.Node, float] = {}
        self.factors: list[tuple[fx.Node, str]] = []
        self.path: list[fx.Node] = []
        self.inner: set[fx.Node] = set()
        self.exact = exact
        self.times = False  # the scores here are multiplied by a mask
        self.heads: int | None = None

    def arrived(self, node: fx.Node, query: Any, key: Any, form: str) -> Scores:
        # softcap * tanh(scale * query @ key^T / softcap)
        scale = self.scale * (self.softcap or 1.0)
        found = (node, query, key, form, scale, self.softcap, self.sink)
        masks = (self.masks, self.mask_scales, self.fills)
        return Scores(*found, *masks, self.factors, self.path, self.inner, self.heads)

    def declined(self, node: fx.Node, reason: str) -> Declined:
        """The reason; of scores that are no product, the reason is that."""
        near = None if reaches_product(self.start) else product_above(self.start)
        if near is not None and near.target in DISTANCES:
            return Declined("the scores are a distance (cdist), not query @ key^T", near)
        return Declined(reason, node)

    def fill_mask(self, condition: fx.Node, how: str, value: object) -> bool:
        """Takes a mask that puts a value in the place of scores; False if it does not hide them."""
        found = constant_of(value, self.context)
        if found is None or self.factors or not found * self.scale <= MASKED_BELOW:
            return False
        self.masks.append((condition, how))
        filled = self.fills.setdefault(condition, found * self.scale)
        if filled != found * self.scale:  # filled twice, with different values
            self.fills[condition] = math.nan
        return True

    def add_mask(self, node: fx.Node) -> bool:
        """Takes an additive mask; False if it is scaled by what is not known, or in two ways."""
        self.masks.append((node, "additive"))
        return not self.factors and self.mask_scales.setdefault(node, self.scale) == self.scale

    def seen_by(self) -> str | None:
        """What, between here and the softmax, tells scores from scores shifted by a constant."""
        if self.softcap:
            return "the softcap (tanh)"
        if self.times:
            return "a multiplication by a mask"
        if self.sink is not None:
            return "attention sink logits"
        return "a logsumexp" if self.exact else None


Step = fx.Node | Scores


def parse_scores(start: Any, context: Context, exact: bool = False) -> Scores | None:
    """Walks from the softmax back to query @ key^T; None if no such product is there at all.

    Args:
        exact: something else reads the scores' logsumexp, so no constant may be passed over.
    Raises:
        Declined: if what stands between is not of the grammar.
    """
    if not isinstance(start, fx.Node):
        return None
    if not reaches_product(start) and product_above(start) is None:
        return None
    walk = _Walk(start, context, exact)
    step: Step = start
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
            raise Declined("the scores are cast to integers", node)
        return node.args[0]  # type: ignore[return-value]
    if views_itself(node):
        return node.args[0]  # type: ignore[return-value]
    if target in FOLDS and (heads := folded_heads(node)) is not None:
        if walk.heads not in (None, heads):
            raise Declined("the heads are folded into the batch in two ways", node)
        walk.heads = heads
        return node.args[0]  # type: ignore[return-value]
    if target in MULTIPLY | DIVIDE:
        return _scaled(node, walk)
    if target in ADD:
        return _added(node, walk)
    if target in SUBTRACT:
        return _subtracted(node, walk)
    if target in WHERE | MASKED_FILL:
        return _masked(node, walk)
    if target in CLAMP:
        return _clamped(node, walk)
    if target in TANH:
        return _capped(node, walk)
    if target is aten.cat.default and any(map(reaches_product, _parts(node))):
        return _joined(node, walk)
    raise walk.declined(
        node, f"'{operator_name(node)}' stands between query @ key^T and the softmax"
    )


def _parts(node: fx.Node) -> list[Any]:
    parts = node.args[0]
    return list(parts) if isinstance(parts, list | tuple) else []


def _scaled(node: fx.Node, walk: _Walk) -> Step:
    source, given = node.args[:2]
    multiply = node.target in MULTIPLY
    if multiply and (reaches_product(given) or not isinstance(source, fx.Node)):
        source, given = given, source
    factor = constant_of(given, walk.context)
    if not reaches_product(source) and (factor is None or not isinstance(source, fx.Node)):
        raise walk.declined(node, f"'{operator_name(node)}' is not of the scores by a scalar")
    if factor is not None:
        if not 0 < factor < math.inf:
            raise walk.declined(node, f"the scores are scaled by {factor}; a scale must be above 0")
        walk.scale = walk.scale * factor if multiply else walk.scale / factor
    elif isinstance(given, fx.Node) and is_scalar(given):
        walk.factors.append((given, "mul" if multiply else "div"))
    elif multiply and isinstance(given, fx.Node) and not walk.softcap:
        walk.masks.append((given, "times"))  # a mask of 0 and 1, if it is anything
        walk.times = True
    else:
        raise walk.declined(
            node, "the scores are scaled by a tensor; scale the query by it instead"
        )
    return source  # type: ignore[return-value]


def _added(node: fx.Node, walk: _Walk) -> Step:
    if node.kwargs.get("alpha", 1) != 1:
        raise walk.declined(node, "the mask is added with alpha != 1; scale the mask instead")
    left, right = node.args[:2]
    from_scores = [s for s in (left, right) if reaches_product(s)]
    if not from_scores:
        raise walk.declined(node, "a sum that is no mask over scores")
    if len(from_scores) == 2:
        raise Declined("additive bias: two products are added before the softmax", node)
    other = right if from_scores[0] is left else left
    return _biased(node, from_scores[0], other, walk)  # type: ignore[arg-type]


def _subtracted(node: fx.Node, walk: _Walk) -> Step:
    source, other = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1:
        raise walk.declined(node, "the mask is subtracted with alpha != 1; scale the mask instead")
    peak = peak_of(other, source)
    if isinstance(peak, str):
        raise walk.declined(node, peak)
    if peak is not None:
        if (what := walk.seen_by()) is not None:
            raise walk.declined(node, f"the maximum is subtracted before {what}, which sees it")
        walk.inner |= peak
        return source  # type: ignore[return-value]
    if not reaches_product(source):
        raise walk.declined(node, "the scores are subtracted from something")
    if reaches_product(other):
        raise Declined("additive bias: two products are subtracted before the softmax", node)
    if isinstance(other, fx.Node):  # `canonicalize` adds its negative
        raise walk.declined(node, "a mask is subtracted; add its negative")
    return _biased(node, source, other, walk)  # type: ignore[arg-type]


def _biased(node: fx.Node, source: fx.Node, other: Any, walk: _Walk) -> Step:
    """Scores with a mask or a constant added to them: softmax(x + constant) == softmax(x)."""
    what = walk.seen_by()
    if walk.softcap or walk.times:
        raise walk.declined(node, f"a mask or bias is added before {what}: add it after")
    if isinstance(other, fx.Node):
        if not walk.add_mask(other):
            raise walk.declined(node, SCALED_LATE)
    elif what is not None:
        raise walk.declined(node, f"a constant is added before {what}, which see it")
    return source


def _masked(node: fx.Node, walk: _Walk) -> Step:
    """where() or masked_fill() of the scores with a value that hides them."""
    condition, yes, no = node.args[:3]
    if node.target in MASKED_FILL:
        condition, yes, no, how = node.args[1], node.args[0], node.args[2], "drop"
        problem = "masked_fill() with a value that is no mask; fill with -inf"
    else:
        problem, how = "where() fills in a value that is no mask; fill with -inf", "keep"
        if reaches_product(no) and not reaches_product(yes):
            yes, no, how = no, yes, "drop"
        if not reaches_product(yes):
            raise walk.declined(node, problem)
    if walk.softcap or walk.times:
        reason = f"the mask is put on before {walk.seen_by()}, which leaves it visible: "
        raise walk.declined(node, reason + "put it on after")
    if not walk.fill_mask(condition, how, no):  # type: ignore[arg-type]
        raise walk.declined(node, problem)
    return yes  # type: ignore[return-value]


def _clamped(node: fx.Node, walk: _Walk) -> Step:
    """Scores clamped at bounds that no score reaches: below, one that counts as masked."""
    source, low, high = node.args[0], argument(node, 1, "min"), argument(node, 2, "max")
    if node.target in (aten.maximum.default, aten.max.other):
        source, low, high = node.args[0], node.args[1], None
        if not reaches_product(source):
            source, low = low, source
    if not reaches_product(source):
        raise walk.declined(node, f"'{operator_name(node)}' is not of the scores")
    far = [(low, -1.0), (high, 1.0)]
    bounds = [(constant_of(x, walk.context), sign) for x, sign in far if x is not None]
    if (
        walk.softcap
        or walk.factors
        or any(x is None or not x * sign * walk.scale >= -MASKED_BELOW for x, sign in bounds)
    ):
        limits = " and ".join(str(x) for x, _ in far if x is not None)
        raise walk.declined(node, f"the scores are clamped at {limits}, which scores may reach")
    return source  # type: ignore[return-value]


def _capped(node: fx.Node, walk: _Walk) -> Step:
    """tanh(): from here on the scale is the softcap, and what comes before is the scale in it."""
    if not reaches_product(node):
        raise walk.declined(node, "tanh() stands before the softmax, over no query @ key^T")
    if walk.softcap:
        raise walk.declined(node, "two softcaps (tanh) stand between query @ key^T and the softmax")
    if walk.factors:
        raise walk.declined(
            node, "the softcap's size is not a constant of the graph; make it a float"
        )
    walk.softcap, walk.scale = walk.scale, 1.0
    return node.args[0]  # type: ignore[return-value]


def _joined(node: fx.Node, walk: _Walk) -> Step:
    """cat([scores, sinks]): sink logits, if they are the last thing before the softmax."""
    if walk.softcap or walk.factors or walk.masks or walk.scale != 1.0 or walk.sink is not None:
        reason = "attention sink logits are joined to the scores (cat) before they are all done: "
        raise walk.declined(node, reason + "join them last, after scale, softcap and mask")
    parts = _parts(node)
    scores = [p for p in parts if reaches_product(p)]
    if len(parts) != 2 or len(scores) != 1:
        raise walk.declined(node, f"{len(parts)} tensors are joined before the softmax (cat)")
    sink = join_of(node, scores[0])
    if isinstance(sink, str):
        raise walk.declined(node, sink)
    walk.sink = sink
    walk.inner |= sink.inner
    return scores[0]


def _product(node: fx.Node, walk: _Walk) -> Step:
    form = einsum.written_as(node)
    if node.target is aten.einsum.default:
        raise Declined(f"einsum '{node.args[0]}' is not query @ key^T", node)
    if node.target is not aten.baddbmm.default:
        query, key = node.args[:2]
        return walk.arrived(node, query, key, form)
    added, query, key = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise Declined(f"the scores are scaled by {alpha}; a scale must be above 0", node)
    if beta != 0:
        if beta != 1:
            raise Declined(f"the mask is added with beta={beta}; scale the mask instead", node)
        if walk.softcap or walk.times:
            what = walk.seen_by()
            raise Declined(f"a mask or bias is added before {what}: add it after", node)
        if not walk.add_mask(added):  # type: ignore[arg-type]
            raise Declined(SCALED_LATE, node)
    walk.scale *= alpha
    return walk.arrived(node, query, key, form)
