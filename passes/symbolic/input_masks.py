"""Masks that come into a graph from outside it: after a graph break, or given by the user.

    before  mask [B, 1, Nq, Nk], an input of the graph, of which nothing is known
    after   the same, and real = mask[:, 0, -1] == a, bool [B, Nk]: who is real, as the last query
            sees it; mask[b, 0, i, j] is read as  a  if j <= i + Nk - Nq and real[b, j],  else  b

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

_GIVEN, _REAL, _FROZEN = "moonfx_given", "moonfx_real", "moonfx_frozen"


@dataclass(frozen=True)
class Given:
    """Values of a causal mask: `kept` for the real keys up to a query's own, else `hidden`."""

    kept: float
    hidden: float


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
        if buffer_value(node) is None and (given := values_of(value)) is not None:
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
    causal = sympy.Le(index[-1], index[-2] + keys - queries)
    return sympy.And(causal, load(_real(node), (*rows, index[-1])))


def write_real_keys(node: fx.Node) -> bool:
    """Writes the node of who is real for an input that `mark` noted; False if it has none."""
    if given_of(node) is None or _REAL in node.meta:
        return False
    _real(node)
    return True


def _real(node: fx.Node) -> fx.Node:
    """The node of who is real; made when it is first asked for, if `write_real_keys` was not."""
    if _REAL not in node.meta:
        first = next(n for n in node.graph.nodes if n.op != "placeholder")
        owner = node.graph.owning_module
        assert owner is not None
        with node.graph.inserting_before(first), fake_values(owner):
            row = call(aten.select.int, node, -2, -1)
            if row.meta["val"].dim() == 3:
                row = call(aten.select.int, row, 1, 0)
            node.meta[_REAL] = call(aten.eq.Scalar, row, node.meta[_GIVEN].kept)
    real: fx.Node = node.meta[_REAL]
    return real
