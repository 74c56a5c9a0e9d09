"""What the author's masks give a keyless query: one from which every key is hidden.

    scores + where(keep, 0, finfo.min)       all scores are the same number: the mean of all values
    scores.masked_fill(~keep, finfo.min)     the same, and no gradient enters the scores
    scores.masked_fill(~keep, -inf)          NaN; scaled_dot_product_attention and the operator: 0
    scores + full(min).triu(1) + padding     the mean of the values that are hidden by one of both

A query of padding on the left is keyless, and a loss reads the last of them: the next token is the
first real one.
"""

from enum import Enum

import sympy
import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import dtype
from moonfx.passes.masks.classify_mask import mask_index
from moonfx.passes.symbolic.expressions import (
    MASKED_BELOW,
    Expr,
    head_symbol,
    loads,
    to_number,
)
from moonfx.passes.symbolic.indices import HEAD, KEY, lengths_of
from moonfx.site import AttentionSite

# A mask so large that scores below this are less than half of its last bit leaves nothing of them.
_LOST = 8.0


class Keyless(Enum):
    """What a keyless query gets."""

    ZERO = "0"
    MEAN = "the mean of all values; gradients flow through the scores"
    MEAN_OF_FILLED = "the mean of all values, and no gradient flows through the scores"
    UNKNOWN = "what is not read"


def keyless(site: AttentionSite, context: Context) -> Keyless:
    """What the dense attention gives a keyless query; ZERO where there is none.

    A step of one query is keyless only in a row of nothing but padding, and counts as ZERO: a mean
    of all values would read the whole cache at each step.
    """
    assert site.mask is not None
    if site.mask.padding is None or site.sink_logits is not None or site.clears_hidden is True:
        return Keyless.ZERO
    if lengths_of(site).one_query:
        return Keyless.ZERO
    left = [_left(node, how, site, context) for node, how in site.masks]
    values = set().union(*left)
    if values == {-sympy.oo}:
        return Keyless.ZERO
    ways = {how == "additive" for (_, how), values in zip(site.masks, left, strict=True) if values}
    if len(values) != 1 or len(ways) != 1 or site.clears_hidden is False or site.lse is not None:
        return Keyless.UNKNOWN
    is_filled = ways == {False}
    biased = any(how == "additive" for _, how in site.masks)  # which may come after what is filled
    if site.causal or ((biased or not is_filled) and not _absorbs(values.pop(), site)):
        return Keyless.UNKNOWN
    if is_filled:
        return Keyless.MEAN_OF_FILLED
    return Keyless.MEAN if sum(map(bool, left)) == 1 else Keyless.UNKNOWN


def _left(node: fx.Node, how: str, site: AttentionSite, context: Context) -> set[Expr]:
    """What a mask puts in the place of scores that it hides, or adds to them; none for a bias."""
    if how == "times":
        return {sympy.nan}
    if how != "additive":
        return {_stored(sympy.sympify(site.fills.get(node, -torch.inf)), site)}
    index = mask_index(site, len(node.meta["val"].shape))
    assert index is not None
    value = context.real(site).broadcast(node, index)
    value = to_number(value.subs(head_symbol(site.heads or 1), HEAD))
    scale = sympy.Float(site.mask_scales.get(node, 1.0))
    found = {x if x is sympy.nan else _stored(x * scale, site) for x in _hidden(value)}
    # Padding that is known only by the values that are added.
    unknown = any(x.has(KEY) and not x.has(HEAD) for x in loads(value))
    return {sympy.nan} if unknown and not found else found


def _hidden(value: Expr) -> set[Expr]:
    """The constants that a value adds where it hides a key; NaN if they are not known."""
    if value.is_number:
        return {value} if value <= MASKED_BELOW else set()
    if isinstance(value, sympy.Mul) and value.has(sympy.Piecewise):
        value = sympy.piecewise_fold(value)
    if isinstance(value, sympy.Piecewise):
        return set().union(*(_hidden(branch) for branch, _ in value.args))
    if isinstance(value, sympy.Add):
        parts = [found for term in value.args if (found := _hidden(term))]
        return parts[0] if len(parts) == 1 else {sympy.nan} if parts else set()
    return set()


def _stored(value: Expr, site: AttentionSite) -> Expr:
    """A value as the scores hold it: -oo if it is too large."""
    return value if value >= torch.finfo(_scores_dtype(site)).min else -sympy.oo


def _absorbs(value: Expr, site: AttentionSite) -> bool:
    """Whether scores of an ordinary size are lost in a number that is added to them."""
    return bool(-value * torch.finfo(_scores_dtype(site)).eps / 4 >= _LOST)


def _scores_dtype(site: AttentionSite) -> torch.dtype:
    """The widest dtype that scores and masks are added in; one operator adds them in float32."""
    if not site.form.endswith("softmax"):
        return torch.float32
    found = site.query.meta["val"].dtype
    for node, how in site.masks:
        if how == "additive":
            found = torch.promote_types(found, dtype(node) or found)
    return found
