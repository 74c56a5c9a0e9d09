"""What looks like a softmax over the keys and its product, and is not: declined, left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.attention.forms import NEG, Model, causal
from tests.passes.attention.lookalikes import (
    Body,
    Row,
    check_lookalike,
    masked,
    scores,
)


def softmax_over(dim: int) -> Body:
    """pytorch#196468: Inductor 2.13 rewrites both."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~causal(), NEG).softmax(dim) @ v

    return body


def powers(power: Callable[[Tensor], Tensor]) -> Body:
    """Softmax in another base, or of another function."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = power(scores(q, k).masked_fill(~causal(), -1e9))
        return e / e.sum(-1, keepdim=True) @ v

    return body


def log_softmax_exp(dim: int) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k).log_softmax(dim).exp() @ v

    return body


def exp_over(total: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / total(e)) @ v

    return body


def exp_not_divided(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k).exp() @ v


def exp_of_logsumexp_over(dim: int) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return (s - s.logsumexp(dim, keepdim=True)).exp() @ v

    return body


LOOKALIKES: list[Row] = [
    ("softmax over the queries", softmax_over(-2), "softmax over dim -2 of 4"),
    ("softmax over the heads", softmax_over(1), "softmax over dim 1 of 4"),
    ("powers of 2", powers(torch.exp2), "written with exp2"),
    ("powers of 3", powers(lambda s: 3.0**s), "written with pow"),
    ("log_softmax over queries", log_softmax_exp(-2), "softmax over dim -2 of 4"),
    ("exp over queries' sum", exp_over(lambda e: e.sum(-2, keepdim=True)), "softmax over dim -2"),
    ("exp over all", exp_over(lambda e: e.sum((-1, -2), keepdim=True)), "exp() and a sum is not"),
    ("exp over more", exp_over(lambda e: e.sum(-1, keepdim=True) + 1), "exp() and a sum is not"),
    ("exp over its max", exp_over(lambda e: e.amax(-1, keepdim=True)), "exp() and a sum is not"),
    ("exp, not divided", exp_not_divided, "a softmax written with exp() and a sum is not read"),
    ("logsumexp over queries", exp_of_logsumexp_over(-2), "softmax over dim -2 of 4"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
