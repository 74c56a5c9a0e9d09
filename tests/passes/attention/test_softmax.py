"""The softmax of attention in every spelling, with what is done against overflow and NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    NEG,
    SCALE,
    Model,
    N,
    causal,
    check_form,
    inputs,
    outcome,
    run,
)


def masked(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * SCALE).masked_fill(~causal(), -torch.inf)


def attention(softmax: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax(masked(q, k)) @ v

    return body


def by_hand(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def by_hand_reciprocal(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1).unsqueeze(-1))
    return e * e.sum(-1, keepdim=True).reciprocal()


def subtracted_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(N, N).triu(1)
    return (q @ k.transpose(-2, -1) * SCALE - hidden * 1e9).softmax(-1) @ v


def no_less_than_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XGLM's form."""
    s = q @ k.transpose(-2, -1) * SCALE + torch.where(causal(), 0.0, NEG)
    return torch.max(s, torch.tensor(NEG)).softmax(-1) @ v


def clamped_far_out(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k).clamp(min=-5e4, max=5e4).softmax(-1) @ v


FORMS: list[tuple[str, Callable[..., Any]]] = [
    ("positive dim", attention(lambda s: s.softmax(3))),
    ("in float32", attention(lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype))),
    ("log_softmax", attention(lambda s: s.log_softmax(-1).exp())),
    ("logsumexp", attention(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp())),
    ("by hand", attention(by_hand)),
    ("by hand, reciprocal", attention(by_hand_reciprocal)),
    ("less a constant", attention(lambda s: (s - 5.0).softmax(-1))),
    ("subtracted mask", subtracted_mask),
    ("no less than the mask", no_less_than_the_mask),
    ("clamped far out", clamped_far_out),
]


@pytest.mark.parametrize("body", [f[1] for f in FORMS], ids=[f[0].replace(" ", "-") for f in FORMS])
def test_a_softmax_is_read_however_it_is_spelled(body: Callable[..., Any]) -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form="matmul + softmax")


def test_safe_softmax_is_a_softmax() -> None:
    """What scaled_dot_product_attention decomposes to: 0 for a query that sees no key."""
    q, k, v = inputs()
    safe = attention(lambda s: torch.ops.aten._safe_softmax(s, -1))
    out, report = run(Model(safe), q, k, v, block=4, topk=2)
    assert outcome(report) == ["causal"]
    torch.testing.assert_close(
        out, moba_attention(q, k, v, MobaArguments(4, 2))[0], atol=2e-6, rtol=1e-5
    )
