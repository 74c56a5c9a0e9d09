"""Attention in a body that no pass looks into is seen, reported, and left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import moonfx
from moonfx.passes.attention.opaque_bodies import attentions_inside
from tests.passes.attention.forms import (
    SCALE,
    Model,
    N,
    inputs,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike


def mapped_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attend(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=True)

    return torch.vmap(attend)(q, k, v)


def mapped_by_hand(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows and heads are mapped over: the scores are [N, N] there."""
    one_head = lambda q, k, v: attend(q @ k.mT * SCALE, v)  # noqa: E731
    return torch.vmap(torch.vmap(one_head))(q, k, v)


LOOKALIKES: list[Row] = [
    ("vmap, sdpa", mapped_sdpa, "attention inside torch.vmap or torch.func"),
    ("vmap, by hand", mapped_by_hand, "attention inside torch.vmap or torch.func"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)


def test_attention_beside_one_under_vmap_is_rewritten_and_both_are_right() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mapped_sdpa(self, y, y, y)

    model = Model(body)
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    for scale in (1.0, 2.0):  # values of the first call must not live on in the graph
        given = [x * scale for x in inputs()]
        torch.testing.assert_close(model(*given), body(model, *given), atol=2e-6, rtol=1e-5)
    assert [r.action for r in moonfx.report(model).rows] == ["sparse", "declined"]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Name, a body that no pass captures, and the operators in it that look like attention.
BODIES: list[tuple[str, Attend, list[str]]] = [
    ("sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), ["scaled_dot_product"]),
    (
        "functions",
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.mT), -1), v),
        ["matmul"],
    ),
    ("methods", lambda q, k, v: q.matmul(k.mT).softmax(-1).matmul(v), ["matmul"]),
    ("by hand", lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).exp() / 2, v), ["bmm"]),
    (
        "two",
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, v) @ k, -1), k).softmax(-1) @ v,
        ["bmm", "matmul"],
    ),
    ("softmax of no product", lambda q, k, v: torch.matmul(F.softmax(q, -1), v), []),
    ("products alone", lambda q, k, v: torch.matmul(torch.matmul(q, k.mT), v), []),
    ("softmax last", lambda q, k, v: torch.matmul(q, k.mT).softmax(-1), []),
]


@pytest.mark.parametrize(("body", "found"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_product_after_a_softmax_after_a_product_looks_like_attention(
    body: Attend, found: list[str]
) -> None:
    nodes = attentions_inside(fx.symbolic_trace(body))
    assert len(nodes) == len(found)
    assert all(name in str(node.target) for node, name in zip(nodes, found))


def test_a_body_inside_a_body_is_looked_into() -> None:
    inner = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    graph = fx.Graph()
    q = graph.placeholder("q")
    graph.output(graph.call_module("inner", (q, q, q)))
    assert len(attentions_inside(fx.GraphModule({"inner": inner}, graph))) == 1
