"""What hand-written attention does to its probabilities against NaN, and when that is nothing.

    nan_to_num(p)    p.masked_fill(p.isnan(), 0)    p.masked_fill(~keep.any(-1, keepdim=True), 0)

Each is the identity on every query that sees a key: it writes 0 where the probabilities are NaN, or
where the scores are masked anyway (for good, or as a whole row). What a query that sees no key gets
then is for passes/masks/keyless.py to say.
"""

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.passes.attention.scores import Scores
from moonfx.passes.attention.upstream import constant_of
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import argument
from moonfx.passes.graph.operators import COPIES, MASKED_FILL, WHERE
from moonfx.passes.masks.additive import NotAMask, split
from moonfx.passes.masks.classify_mask import mask_index
from moonfx.passes.symbolic.expressions import head_symbol, to_bool
from moonfx.passes.symbolic.indices import HEAD
from moonfx.site import AttentionSite, Declined

aten = torch.ops.aten

NAN_TO_NUM = {aten.nan_to_num.default, aten.nan_to_num_.default}
_IS_NAN = {aten.isnan.default}
_NOT = {aten.logical_not.default, aten.bitwise_not.default}


@dataclass
class Guard:
    """Probabilities that are set to 0 where a condition holds.

    Args:
        node: what sets them.
        condition: None if it can only hold where they are NaN.
        keep: the probabilities are kept, and not set, where it holds.
        inner: nodes that test the probabilities for it.
    """

    node: fx.Node
    condition: fx.Node | None = None
    keep: bool = False
    inner: set[fx.Node] = field(default_factory=set)


def guard_of(node: fx.Node, probabilities: fx.Node, context: Context) -> Guard | str | None:
    """A user of the probabilities as a guard; why it is none; None if it is nothing like it."""
    if node.target in NAN_TO_NUM:
        filled = argument(node, 1, "nan")
        return Guard(node) if filled in (None, 0.0) else f"nan_to_num(nan={filled})"
    if node.target in MASKED_FILL and node.args[0] is probabilities:
        condition, filled, keep = node.args[1], node.args[2], False
    elif node.target in WHERE and probabilities in node.args[1:3]:
        keep = node.args[1] is probabilities
        condition, filled = node.args[0], node.args[2 if keep else 1]
    else:
        return None
    if constant_of(filled, context) != 0.0:
        return "the probabilities are filled with something other than 0; mask the scores"
    assert isinstance(condition, fx.Node)
    inner: set[fx.Node] = set()
    test, on_nan = condition, True
    while test.target in _NOT:
        inner.add(test)
        test, on_nan = test.args[0], not on_nan  # type: ignore[assignment]
    of = [a for a in test.args if isinstance(a, fx.Node)]
    if test.target in _IS_NAN | {aten.ne.Tensor, aten.eq.Tensor} and set(of) == {probabilities}:
        on_nan ^= test.target is aten.eq.Tensor
        if on_nan == keep:
            return "the probabilities are set to 0 where they are not NaN"
        return Guard(node, inner={*inner, test})
    return Guard(node, condition, keep)


def check_guard(guard: Guard, site: AttentionSite, scores: Scores, context: Context) -> bool | None:
    """Whether the guard clears all that the masks of the site hide; None if nothing but NaN.

    Raises:
        Declined: unless it changes only what they hide, or NaN.
    """
    if guard.condition is None:
        return None
    node: Any = guard.condition
    keep = guard.keep
    while node.target in COPIES | _NOT:
        keep ^= node.target in _NOT
        node = node.args[0]
    row = {aten.any.dim: True, aten.all.dim: False}.get(node.target)
    if row is not None:
        dim, keepdim = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        rank = len(node.meta["val"].shape)
        whole = keepdim and dim % rank == rank - 1 and row == keep
        if not whole:
            test = "the probabilities are set to 0 by a test not of whole rows; mask the scores"
            raise Declined(test, node)
        node = node.args[0]
        while node.target in COPIES | _NOT:
            keep ^= node.target in _NOT
            node = node.args[0]
        tested = node.args[0] if node.target is aten.eq.Scalar else None
        if tested in scores.path and node.args[1] == -torch.inf and not keep:
            scores.inner.add(node)
            scores.inner |= _between(node, guard.condition)
            return None
    condition = _read(node, site, context)
    if condition is not None:
        visible = _visible(site, context) - {sympy.true}
        given = to_bool(condition) if keep else sympy.Not(to_bool(condition))
        kept = set(_atoms(given)) - {sympy.true}
        if kept <= visible:
            return kept == visible
    raise Declined(
        "the probabilities are set to 0 where the scores are not known to be masked; mask those",
        node,
    )


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """The chain of nodes from a test of the scores up to a guard's condition."""
    found, node = {end}, end
    while node is not start:
        node = node.args[0]  # type: ignore[assignment]
        found.add(node)
    return found


def _read(node: fx.Node, site: AttentionSite, context: Context) -> Any:
    index = mask_index(site, len(node.meta["val"].shape))
    if index is None:
        return None
    return context.reader.broadcast(node, index).subs(head_symbol(site.heads or 1), HEAD)


def _visible(site: AttentionSite, context: Context) -> set[Any]:
    """What is known to hold wherever a score is not masked."""
    atoms: set[Any] = set()
    for node, how in site.masks:
        value = _read(node, site, context)
        if value is None:
            continue
        try:
            condition = split(value).keep if how == "additive" else to_bool(value)
        except NotAMask:
            continue
        condition = sympy.Not(condition) if how == "drop" else condition
        atoms.update(_atoms(condition))
    return atoms


def _atoms(condition: Any) -> list[Any]:
    """The parts of a conjunction, i >= j and j <= i written alike."""
    parts = sympy.And.make_args(sympy.to_nnf(condition, simplify=False))
    return [getattr(part, "canonical", part) for part in parts]
