"""Logsumexp of the scores, read beside their softmax: the operator's, or declined."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.attention.forms import (
    SCALE,
    SINK,
    Model,
    check_form,
    hidden,
    inputs,
    outcome,
    run,
    sunk,
)
from tests.passes.attention.lookalikes import scores


def scaled_by_lse(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Granite's form of sink logits: what is computed from lse stands before the product."""
    s = hidden(scores(q, k))
    share = (s.logsumexp(-1) - self.sink.view(1, -1, 1)).float().sigmoid()
    return s.softmax(-1) @ v * share.unsqueeze(-1)


def lse_kept_and_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    out = s.softmax(-1) @ v
    return out * torch.sigmoid(torch.logsumexp(s, dim=-1, keepdim=True) - self.sink)


@pytest.mark.parametrize("body", [scaled_by_lse, lse_kept_and_last], ids=lambda b: b.__name__)
def test_logsumexp_of_the_scores_comes_from_the_operator(body: Callable[..., Any]) -> None:
    check_form(body, sunk, form="matmul + softmax", modifiers="logsumexp", sink=SINK)


def lse_of_a_shift(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k)) + 1.0
    return s.softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_without_max(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_before_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return hidden(s).softmax(-1) @ v * s.logsumexp(-1, keepdim=True).sigmoid()


def lse_over_queries(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    return s.softmax(-1) @ v * s.logsumexp(-2).sigmoid().unsqueeze(-1)


def lse_enters_the_values(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    return s.softmax(-1) @ (v * s.logsumexp(-1, keepdim=True).sigmoid())


def lse_through_a_sum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    share = s.logsumexp(-1, keepdim=True).cumsum(2).sigmoid()
    return s.softmax(-1) @ v * share


def lse_without_gradient(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
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
    (found,) = outcome(report)
    assert found.startswith(reason)
    torch.testing.assert_close(out, expected)
