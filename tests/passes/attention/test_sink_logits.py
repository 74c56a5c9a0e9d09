"""Attention sink logits, however they are written: found, kept, and equal to dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    NEG,
    SCALE,
    SINK,
    B,
    H,
    Model,
    N,
    check_form,
    hidden,
    inputs,
    outcome,
    run,
    sunk,
)
from tests.passes.attention.lookalikes import Body, Row, check_lookalike, masked, scores

CAP = 0.7  # low enough that the scores of these inputs reach it


def sink_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-OSS's form in transformers."""
    sinks = self.sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    s = torch.cat([hidden(scores(q, k)), sinks], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return s.softmax(-1, dtype=s.dtype)[..., :-1] @ v


def sink_first(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers' head_learned_sink."""
    s = torch.cat([self.sink[None].expand(B, H, N, 1), hidden(scores(q, k))], dim=-1)
    return s.softmax(-1)[..., 1:] @ v


def sink_repeated(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat((hidden(scores(q, k)), self.sink.view(1, H, 1, 1).repeat(B, 1, N, 1)), 3)
    return s.softmax(3).narrow(3, 0, N) @ v


def sink_by_hand(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat((hidden(scores(q, k)), self.sink.expand(B, H, N, 1)), -1)
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return (e / e.sum(-1, keepdim=True))[..., :-1] @ v


@pytest.mark.parametrize(
    "body", [sink_last, sink_first, sink_repeated, sink_by_hand], ids=lambda b: b.__name__
)
def test_sink_logits_join_the_denominator_and_no_value(body: Callable[..., Any]) -> None:
    check_form(body, sunk, form="matmul + softmax", modifiers="sink logits", sink=SINK)


def test_softcap_and_sink_logits_go_together() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = hidden(torch.tanh(q @ k.mT * SCALE / CAP) * CAP)
        s = torch.cat([s, self.sink.expand(B, H, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    both = "softcap 0.7, sink logits"
    expected = lambda q, k, v: sunk(q, k, v, CAP)  # noqa: E731
    check_form(body, expected, form="matmul + softmax", modifiers=both, sink=SINK)


def test_one_sink_logit_may_serve_all_heads() -> None:
    """softmax with 1 added to the denominator."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.cat([hidden(scores(q, k)), torch.zeros(1, 1, 1, 1).expand(B, H, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = moba_attention(q, k, v, MobaArguments(4, 2))
        return out * torch.sigmoid(lse)[..., None]

    check_form(body, expected, form="matmul + softmax", modifiers="sink logits")


def test_sink_logits_learn_as_in_dense_attention() -> None:
    grads = []
    for compile in (False, True):
        sink = SINK.clone().requires_grad_()

        def body(self: Model, q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
            s = torch.cat([hidden(scores(q, k)), sink.expand(B, H, N, 1)], -1)
            return s.softmax(-1)[..., :-1] @ v

        given = (*inputs(), sink)
        out = run(Model(body), *given)[0] if compile else Model(body)(*given)
        out.square().sum().backward()
        grads.append(sink.grad)
    torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-4)


def test_sink_logits_that_lose_their_gradient_on_the_way_are_declined() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        with torch.no_grad():
            column = sink.expand(B, H, N, 1)
        return torch.cat([hidden(scores(q, k)), column], -1).softmax(-1)[..., :-1] @ v

    _, report = run(Model(body), *inputs(), SINK.clone().requires_grad_())
    assert outcome(report) == ["part of the sink logits is under torch.no_grad()"]


def test_padding_and_sink_logits_go_together() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = hidden(scores(q, k)).masked_fill(~real[:, None, None], -torch.inf)
        s = torch.cat([s, self.sink.expand(B, H, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :7] = False
    q, k, v = inputs()
    out, report = run(Model(body, sink=SINK), q, k, v, real)
    assert outcome(report) == ["causal & padding"]
    dense = body(Model(body, sink=SINK), q, k, v, real)
    mine = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[mine], dense[mine], atol=2e-6, rtol=1e-5)


def test_sink_logits_see_a_constant_that_is_added() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.cat([hidden(scores(q, k)) + self.shift, self.sink.expand(B, H, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    model, given = Model(body, sink=SINK, shift=torch.full((1,), 0.7)), inputs()
    dense = body(model, *given)
    out, report = run(model, *given)
    assert [(r.action, r.modifiers) for r in report.rows] == [("sparse", "sink logits, key bias")]
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


def beside(
    sink: Callable[[Model, Tensor, Tensor], Tensor],
    cut: Callable[[Tensor], Tensor] = lambda p: p[..., :-1],
    after: Callable[[Tensor], Tensor] = lambda s: s,
    before: Callable[[Tensor], Tensor] = lambda s: s,
) -> Body:
    """Attention with a column of scores beside the keys that is cut off the probabilities."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.cat([before(masked(q, k)), sink(self, q, k)], -1)
        return cut(after(s).softmax(-1)) @ v

    return body


def by_head(self: Model, q: Tensor, k: Tensor) -> Tensor:
    return self.sink.expand(B, H, N, 1)


def sink_with_a_value(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([masked(q, k), by_head(self, q, k)], -1)
    return s.softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def another_row_of_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([masked(q, k), self.bias[:, :, :1].expand(B, H, 1, N)], -2)
    return (s.softmax(-1) @ v)[:, :, :-1]


LOOKALIKES: list[Row] = [
    ("sink, not cut off", sink_with_a_value, "and not cut off again"),
    ("sink, a key cut off", beside(by_head, lambda p: p[..., 1:]), "come last, and another part"),
    ("sink by query", beside(lambda m, q, k: q[..., :1]), "not proved to be one number per head"),
    ("sink by key", beside(lambda m, q, k: m.bias[..., :1].expand(B, H, N, 1)), "not proved"),
    ("sink by row", beside(lambda m, q, k: q[:, :, :1, :1].expand(B, H, N, 1)), "not proved"),
    (
        "two sinks",
        beside(lambda m, q, k: m.sink.expand(B, H, N, 2), lambda p: p[..., :-2]),
        "more than one column",
    ),
    ("sink, then scaled", beside(by_head, after=lambda s: s * 0.5), "before they are all done"),
    (
        "sink, then masked",
        beside(by_head, after=lambda s: s.masked_fill(torch.arange(N + 1) > N, NEG)),
        "before they are all done",
    ),
    (
        "sink, then softcap",
        beside(by_head, after=lambda s: 5 * torch.tanh(s / 5)),
        "before they are all done",
    ),
    (
        "max subtracted, then sink",
        beside(by_head, before=lambda s: s - s.amax(-1, keepdim=True)),
        "the maximum is subtracted before attention sink logits",
    ),
    (
        "constant added, then sink",
        beside(by_head, before=lambda s: s + 1.0),
        "a constant is added before attention sink logits",
    ),
    ("a row more", another_row_of_scores, "not along the keys"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
