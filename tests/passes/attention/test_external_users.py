"""What belongs to one attention alone: nothing else may read what the rewrite removes."""

import pytest
import torch
from torch import Tensor

from tests.passes.attention.forms import (
    Model,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike, masked, scores


def scores_reused(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return attend(s, v) + s.mean(-1, keepdim=True)


def capped_and_reused(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    capped = torch.tanh(scores(q, k))
    return attend(capped * 5, v) + capped.mean(-1, keepdim=True)


def log_softmax_kept(self: Model, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = masked(q, k).log_softmax(-1)
    return p.exp() @ v, p


LOOKALIKES: list[Row] = [
    ("scores reused", scores_reused, "the scores are used more than once"),
    ("softcap reused", capped_and_reused, "the scores are used more than once"),
    ("log_softmax returned", log_softmax_kept, "the scores are used more than once"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
