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
    B,
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


def guarded(guard: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """guard(scores, probabilities)"""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return guard(s, s.softmax(-1)) @ v

    return body


def divided_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = masked(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


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


def dropout_of_zero(s: Tensor) -> Tensor:
    return F.dropout(s.softmax(-1), 0.0, training=True)


FORMS: list[tuple[str, Callable[..., Any]]] = [
    ("positive dim", attention(lambda s: s.softmax(3))),
    ("in float32", attention(lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype))),
    ("log_softmax", attention(lambda s: s.log_softmax(-1).exp())),
    ("logsumexp", attention(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp())),
    ("by hand", attention(by_hand)),
    ("by hand, reciprocal", attention(by_hand_reciprocal)),
    ("divided last", divided_last),
    ("less its maximum", attention(lambda s: (s - s.amax(-1, keepdim=True).detach()).softmax(-1))),
    ("less the largest of all", attention(lambda s: (s - s.max()).softmax(-1))),
    ("less a constant", attention(lambda s: (s - 5.0).softmax(-1))),
    ("dropout of 0", attention(dropout_of_zero)),
    ("nan_to_num", guarded(lambda s, p: p.nan_to_num())),
    ("isnan", guarded(lambda s, p: p.masked_fill(p.isnan(), 0.0))),
    ("where is NaN", guarded(lambda s, p: torch.where(p.isnan(), torch.zeros_like(p), p))),
    ("is itself", guarded(lambda s, p: torch.where(p == p, p, 0.0))),
    ("hidden again", guarded(lambda s, p: p.masked_fill(~causal(), 0.0))),
    ("no key seen", guarded(lambda s, p: p.masked_fill((~causal()).all(-1, keepdim=True), 0.0))),
    (
        "no score left",
        guarded(lambda s, p: torch.where((s == -torch.inf).all(-1, keepdim=True), 0.0, p)),
    ),
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


def test_padding_beside_a_guard_is_read_from_both() -> None:
    """The guard sets to 0 what the mask hides, padding included."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        keep = causal() & real.view(B, 1, 1, N)
        s = (q @ k.transpose(-2, -1) * SCALE).masked_fill(~keep, NEG)
        return s.softmax(-1).masked_fill(~real.view(B, 1, 1, N), 0.0) @ v

    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :7] = False
    q, k, v = inputs()
    out, report = run(Model(body), q, k, v, real, block=4, topk=2)
    assert outcome(report) == ["causal & padding"]
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, key_mask=real))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_another_row_or_head_is_no_constant() -> None:
    """A maximum of each head is one number per query only with the keys in it."""
    q, k, v = inputs()
    for dims, verdict in (((1, 3), "causal"), ((0, 1), "the maximum that is subtracted is not")):

        def body(self: Model, q: Tensor, k: Tensor, v: Tensor, d: Any = dims) -> Tensor:
            s = masked(q, k)
            return (s - s.amax(d, keepdim=True)).softmax(-1) @ v

        _, report = run(Model(body), q, k, v)
        assert outcome(report)[0].startswith(verdict)
