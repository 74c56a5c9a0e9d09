"""Masks that come into a graph from outside it: after a graph break, or given by the user.

    before  mask [B, 1, Nq, Nk], an input of the graph, of which nothing is known
    after   the same, and real = mask[:, 0, -1] == a, bool [B, Nk]: who is real, as the last query
            sees it; mask[b, 0, i, j] is read as  a  if j <= i + Nk - Nq and real[b, j],  else  b

    before  mask [B, N, N], an input of the graph that is block-diagonal and causal (packed batches)
    after   the same, and first = argmax(mask == a), [B, N]: the first key that each query sees;
            mask[b, i, j] is read as  a  if j <= i and first[b, i] == first[b, j],  else  b

Nothing about an input can be proved when the graph is compiled. What is found in its values then
is a `Given`, and whoever compiles the graph must check it at each call (backend/guards.py): with
any other mask the graph has to run as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moonfx.capture.graph_nodes import buffer_value, placeholders
from moonfx.capture.sizes import expression, fake_values
from moonfx.passes.graph.nodes import call
from moonfx.passes.symbolic.expressions import Expr, Index

aten = torch.ops.aten

_GIVEN, _KEYS, _FROZEN = "moonfx_given", "moonfx_keys", "moonfx_frozen"


@dataclass(frozen=True)
class Given:
    """Values of a causal mask: `kept` for the real keys up to a query's own, else `hidden`."""

    kept: float
    hidden: float


class Packed(Given):
    """Values of a packed mask: `kept` for a query's own sequence up to itself, else `hidden`."""


def given_by(mask: object) -> Given | None:
    """What is known of a mask by its values; a causal one [B, N, N] is a packed one as well.

    Those that make such masks pack sequences, and may have a row of one sequence by chance.
    """
    packed = packed_values_of(mask)
    if packed is not None and isinstance(mask, Tensor) and mask.dim() == 3:
        return packed
    return values_of(mask) or packed


def packed_values_of(mask: object) -> Packed | None:
    """What a mask [..., N, N] is; None if it is not causal inside of blocks along its diagonal."""
    if not (isinstance(mask, Tensor) and _may_be(mask) and mask.shape[-2] == mask.shape[-1]):
        return None
    kept, hidden = mask[(0,) * (mask.dim() - 1)][[0, -1]]
    if bool(kept == hidden):
        return None
    first = _first_key(mask == kept)
    own = first.unsqueeze(-1) == first.unsqueeze(-2)
    if not bool(mask.eq(torch.where(own.tril(), kept, hidden)).all()):
        return None
    return Packed(kept.item(), hidden.item())


def _first_key(keep: Tensor) -> Tensor:
    return keep.to(torch.uint8).argmax(-1)


def values_of(mask: object) -> Given | None:
    """What a mask [..., Nq, Nk] is, its last query at the last key; None if it is not causal."""
    if not (isinstance(mask, Tensor) and _may_be(mask)):
        return None
    last, hidden = mask[..., -1, :], mask[(0,) * (mask.dim() - 1)][-1]
    others = last[last != hidden]
    if others.numel() == 0:
        return None
    kept = others[0]
    queries, keys = mask.shape[-2:]
    below = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    real = last.eq(kept).unsqueeze(-2)
    if not bool(mask.eq(torch.where(below & real, kept, hidden)).all()):
        return None
    return Given(kept.item(), hidden.item())


def _may_be(value: Tensor) -> bool:
    """[Nq, Nk], [B, Nq, Nk] or [B, 1, Nq, Nk], and nobody trains it."""
    if type(value) is not Tensor or value.numel() == 0:
        return False
    kind = value.dtype == torch.bool or value.dtype.is_floating_point
    shape = value.shape
    ranks = len(shape) in (2, 3) or (len(shape) == 4 and shape[1] == 1)
    return kind and not value.requires_grad and ranks and 1 < shape[-2] <= shape[-1]


def mark(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Notes on each input of a captured graph that is such a mask what its values are.

    And on each tensor whether it requires a gradient, which Dynamo guards.
    """
    for node, value in zip(placeholders(gm.graph), example_inputs, strict=True):
        node.meta[_FROZEN] = isinstance(value, Tensor) and not value.requires_grad
        if buffer_value(node) is None and (given := given_by(value)) is not None:
            node.meta[_GIVEN] = given


def given_of(node: fx.Node) -> Given | None:
    """What `mark` noted on an input."""
    return node.meta.get(_GIVEN)


def is_frozen(node: fx.Node) -> bool:
    """Whether an input is known to require no gradient."""
    return bool(node.meta.get(_FROZEN))


def where_kept(node: fx.Node, index: Index, load: Callable[[fx.Node, Index], Expr]) -> Expr:
    """The condition under which a marked input holds `kept` at an index.

    Args:
        load: reads a node at an index.
    """
    queries, keys = (expression(n) for n in node.meta["val"].shape[-2:])
    rows = index[:-3] if len(index) == 4 else index[:-2]
    own = index[-2] + keys - queries
    causal = sympy.Le(index[-1], own)
    at_key = load(_of_keys(node), (*rows, index[-1]))
    if not isinstance(given_of(node), Packed):
        return sympy.And(causal, at_key)
    return sympy.And(causal, sympy.Eq(at_key, load(_of_keys(node), (*rows, own))))


def write_keys(node: fx.Node) -> bool:
    """Writes the node of what the keys are for an input that `mark` noted; False if it has none."""
    if given_of(node) is None or _KEYS in node.meta:
        return False
    _of_keys(node)
    return True


def _of_keys(node: fx.Node) -> fx.Node:
    """Which keys are real, or their sequences; made when asked for, if not by `write_keys`."""
    if _KEYS not in node.meta:
        first = next(n for n in node.graph.nodes if n.op != "placeholder")
        owner = node.graph.owning_module
        assert owner is not None
        with node.graph.inserting_before(first), fake_values(owner):
            mask, given = node, node.meta[_GIVEN]
            if mask.meta["val"].dim() == 4:
                mask = call(aten.select.int, mask, 1, 0)
            if not isinstance(given, Packed):
                mask = call(aten.select.int, mask, -2, -1)
            keys = call(aten.eq.Scalar, mask, given.kept)
            if isinstance(given, Packed):  # the first key that a query sees
                keys = call(aten.argmax.default, call(aten.to.dtype, keys, torch.uint8), -1)
            node.meta[_KEYS] = keys
    keys = node.meta[_KEYS]
    assert isinstance(keys, fx.Node)
    return keys
