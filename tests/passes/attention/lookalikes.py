"""Look-alikes of attention: a graph that must be declined by name, and run as it was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.passes.attention.forms import NEG, SCALE, D, H, Model, N, causal, inputs, outcome, run

Body = Callable[..., Any]
Row = tuple[str, Body, str | None]


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.masked_fill(~causal(s.shape[-2], s.shape[-1]), -torch.inf).softmax(-1) @ v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def masked(q: Tensor, k: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~causal(), NEG)


def model_of(body: Body) -> Model:
    generator = torch.Generator().manual_seed(1)
    holed = causal()
    holed[9, 2] = False
    return Model(
        body,
        bias=torch.randn(1, H, N, N, generator=generator),
        table=torch.randn(17, H, generator=generator),
        sink=torch.randn(H, 1, 1, generator=generator),
        mix=torch.randn(H, H, generator=generator),
        gate=torch.randn(8, H * D, generator=generator),
        by_head=torch.rand(1, H, 1, N, generator=generator) < 0.9,
        row=torch.full((1, N), torch.nan),
        holed=holed,
        row_id=torch.arange(N) % 5,
    )


def check_lookalike(body: Body, reason: str | None, attentions: int = 1) -> None:
    """The graph is declined for `reason` (None: it is not seen as attention), its values unchanged.

    Args:
        attentions: at most so many rows of the report.
    """
    given = inputs()
    torch.manual_seed(3)
    expected = model_of(body)(*given)
    torch.manual_seed(3)
    got, report = run(model_of(body), *given)
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)
    assert {r.action for r in report.rows} == (set() if reason is None else {"declined"})
    assert len(report.rows) <= attentions
    assert reason is None or reason in outcome(report)[0], outcome(report)[0]
    assert all("(node " in r.reason for r in report.rows)
