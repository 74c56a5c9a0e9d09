"""What is done to probabilities against NaN: read where it is nothing, declined where it is not."""

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
    B,
    Model,
    N,
    causal,
    check_form,
    hidden,
    inputs,
    outcome,
    run,
)
from tests.passes.attention.lookalikes import Body, Row, check_lookalike, scores


def guarded(guard: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """guard(scores, probabilities)"""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = hidden(scores(q, k))
        return guard(s, s.softmax(-1)) @ v

    return body


FORMS: list[tuple[str, Body]] = [
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
]


@pytest.mark.parametrize("body", [f[1] for f in FORMS], ids=[f[0].replace(" ", "-") for f in FORMS])
def test_a_guard_against_nan_changes_no_query_that_sees_a_key(body: Body) -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form="matmul + softmax")


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


LOOKALIKES: list[Row] = [
    ("NaN to 1", guarded(lambda s, p: p.nan_to_num(1.0)), "nan_to_num(nan=1.0)"),
    (
        "NaN filled with 1",
        guarded(lambda s, p: p.masked_fill(p.isnan(), 1.0)),
        "filled with something other than 0",
    ),
    (
        "not NaN",
        guarded(lambda s, p: p.masked_fill(~p.isnan(), 0.0)),
        "set to 0 where they are not NaN",
    ),
    (
        "filled by another mask",
        guarded(lambda s, p: p.masked_fill(~causal().T, 0.0)),
        "set to 0 where the scores are not known to be masked",
    ),
    (
        "filled where seen",
        guarded(lambda s, p: torch.where(causal(), 0.0, p)),
        "set to 0 where the scores are not known to be masked",
    ),
    (
        "filled where any is hidden",
        guarded(lambda s, p: p.masked_fill((~causal()).any(-1, keepdim=True), 0.0)),
        "by a test not of whole rows",
    ),
    (
        "filled where no query sees",
        guarded(lambda s, p: p.masked_fill((~causal()).all(-2, keepdim=True), 0.0)),
        "by a test not of whole rows",
    ),
    ("small ones dropped", guarded(lambda s, p: p.masked_fill(p < 0.05, 0.0)), "also used by lt"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
