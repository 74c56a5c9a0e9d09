"""Softcap and attention sink logits, however they are written: found, kept, and equal to dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    SCALE,
    B,
    H,
    Model,
    N,
    causal,
    check_form,
    inputs,
    outcome,
    run,
)

CAP = 0.7  # low enough that the scores of these inputs reach it


def hidden(s: Tensor) -> Tensor:
    return s.masked_fill(~causal(), -torch.inf)


def cap_divided(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return hidden(torch.tanh(s / CAP) * CAP).softmax(-1) @ v


def cap_step_by_step(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma-2's own form."""
    s = q @ k.mT * SCALE
    s = s / CAP
    s = torch.tanh(s)
    s = s * CAP
    return hidden(s).softmax(-1) @ v


def cap_commuted(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(CAP * (q @ k.mT * (SCALE / CAP)).tanh()).softmax(-1) @ v


def cap_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    s = s.div_(CAP).tanh_() * CAP
    return s.masked_fill_(~causal(), -torch.inf).softmax(-1) @ v


def cap_scales_query(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q * (SCALE / CAP), k).tanh() / (1 / CAP)
    return (s + torch.where(causal(), 0.0, -torch.inf)).softmax(-1) @ v


def cap_of_a_buffer(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden((q @ k.mT * SCALE / self.cap).tanh() * self.cap).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moba_attention(q, k, v, MobaArguments(4, 2, softcap=CAP))[0]


CAPS = [
    (cap_divided, "matmul + softmax"),
    (cap_step_by_step, "matmul + softmax"),
    (cap_commuted, "matmul + softmax"),
    (cap_in_place, "matmul + softmax"),
    (cap_of_a_buffer, "matmul + softmax"),
]


@pytest.mark.parametrize(("body", "form"), CAPS, ids=[c[0].__name__ for c in CAPS])
def test_a_softcap_is_read_from_its_constants(body: Callable[..., Any], form: str) -> None:
    check_form(body, capped, form=form, modifiers="softcap 0.7", cap=torch.tensor(CAP))


def test_a_softcap_over_a_scaled_query_keeps_that_query() -> None:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q * (SCALE / CAP), k, v, MobaArguments(4, 2, scale=CAP, softcap=CAP))[
            0
        ]

    check_form(cap_scales_query, expected, form="einsum + softmax", modifiers="softcap 0.7")


def test_a_softcap_that_is_not_the_divisor_scales_the_scores_as_well() -> None:
    """a * tanh(b * s) is a softcap of a over scores scaled by a * b."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hidden(2.0 * (q @ k.mT * 0.3).tanh()).softmax(-1) @ v

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, MobaArguments(4, 2, scale=0.6, softcap=2.0))[0]

    check_form(body, expected, form="matmul + softmax", modifiers="softcap 2")


# --- sink logits ----------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor) -> Tensor:
    return hidden(q @ k.mT * SCALE)


def sink_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-OSS's form in transformers."""
    sinks = self.sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    s = torch.cat([scores(q, k), sinks], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return s.softmax(-1, dtype=s.dtype)[..., :-1] @ v


def sink_first(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers' head_learned_sink."""
    s = torch.cat([self.sink[None].expand(B, H, N, 1), scores(q, k)], dim=-1)
    return s.softmax(-1)[..., 1:] @ v


def sink_repeated(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat((scores(q, k), self.sink.view(1, H, 1, 1).repeat(B, 1, N, 1)), 3)
    return s.softmax(3).narrow(3, 0, N) @ v


def sink_by_hand(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat((scores(q, k), self.sink.expand(B, H, N, 1)), -1)
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return (e / e.sum(-1, keepdim=True))[..., :-1] @ v


def sunk(q: Tensor, k: Tensor, v: Tensor, cap: float = 0.0) -> Tensor:
    out, lse = moba_attention(q, k, v, MobaArguments(4, 2, softcap=cap))
    return out * torch.sigmoid(lse - SINK[None, :, 0])[..., None]


SINK = torch.tensor([0.3, -1.0, 2.0, 0.0]).view(H, 1, 1)


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
        s = torch.cat([scores(q, k), torch.zeros(1, 1, 1, 1).expand(B, H, N, 1)], -1)
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
            s = torch.cat([scores(q, k), sink.expand(B, H, N, 1)], -1)
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
        return torch.cat([scores(q, k), column], -1).softmax(-1)[..., :-1] @ v

    _, report = run(Model(body), *inputs(), SINK.clone().requires_grad_())
    assert outcome(report) == ["part of the sink logits is under torch.no_grad()"]


# --- logsumexp of the scores, read beside their softmax -------------------------------------------


def scaled_by_lse(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Granite's form of sink logits: what is computed from lse stands before the product."""
    s = scores(q, k)
    share = (s.logsumexp(-1) - self.sink.view(1, -1, 1)).float().sigmoid()
    return s.softmax(-1) @ v * share.unsqueeze(-1)


def lse_kept_and_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    out = s.softmax(-1) @ v
    return out * torch.sigmoid(torch.logsumexp(s, dim=-1, keepdim=True) - self.sink)


@pytest.mark.parametrize("body", [scaled_by_lse, lse_kept_and_last], ids=lambda b: b.__name__)
def test_logsumexp_of_the_scores_comes_from_the_operator(body: Callable[..., Any]) -> None:
    check_form(body, sunk, form="matmul + softmax", modifiers="logsumexp", sink=SINK)


def lse_of_a_shift(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) + 1.0
    return s.softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_without_max(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_before_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return hidden(s).softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_over_queries(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ v * s.logsumexp(-2).sigmoid().unsqueeze(-1)


def lse_enters_the_values(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ (v * s.logsumexp(-1, keepdim=True).sigmoid())


def lse_through_a_sum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    share = s.logsumexp(-1, keepdim=True).cumsum(2).sigmoid()
    return s.softmax(-1) @ v * share


def lse_without_gradient(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    with torch.no_grad():
        share = s.logsumexp(-1, keepdim=True).sigmoid()
    return s.softmax(-1) @ v * share


NOT_THE_OPERATORS = [
    (lse_of_a_shift, "a constant is added before a logsumexp"),
    (lse_without_max, "the maximum is subtracted before a logsumexp"),
    (lse_before_the_mask, "the scores are used more than once"),
    (lse_over_queries, "the scores are used more than once"),
    (lse_enters_the_values, "logsumexp of the scores"),
    (lse_through_a_sum, "logsumexp of the scores is read by"),
    (lse_without_gradient, "logsumexp of the scores is under another mode"),
]


@pytest.mark.parametrize(
    ("body", "reason"), NOT_THE_OPERATORS, ids=[r[0].__name__ for r in NOT_THE_OPERATORS]
)
def test_a_logsumexp_that_is_not_the_operators_is_declined(
    body: Callable[..., Any], reason: str
) -> None:
    given = inputs()
    expected = Model(body)(*given)
    out, report = run(Model(body), *(x.requires_grad_() for x in given))
    (said,) = outcome(report)
    assert said.startswith(reason)
    torch.testing.assert_close(out, expected)


def test_padding_and_sink_logits_go_together() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(~real[:, None, None], -torch.inf)
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
        s = torch.cat([scores(q, k) + self.shift, self.sink.expand(B, H, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    model, given = Model(body, sink=SINK, shift=torch.full((1,), 0.7)), inputs()
    dense = body(model, *given)
    out, report = run(model, *given)
    assert [(r.action, r.modifiers) for r in report.rows] == [("sparse", "sink logits, key bias")]
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 2], ids=["left by two", "right by one"])
def test_padding_of_the_whole_batch_is_not_taken_for_a_causal_mask(first: int) -> None:
    """A bool mask [B, N] may have the values of a causal one of B queries."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~real[:, None, None], -torch.inf).softmax(-1) @ v

    real = torch.ones(B, N, dtype=torch.bool)
    real[:, :first] = False
    real[0, -1] = first > 0
    given = (*inputs(), real)
    dense = body(Model(body), *given)
    out, report = run(Model(body), *given)
    assert outcome(report) == ["causal & padding"]
    mine = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[mine], dense[mine], atol=2e-6, rtol=1e-5)
