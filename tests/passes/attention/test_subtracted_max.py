"""The maximum that is subtracted before exp(): of every key of a query, or declined."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    Model,
    check_form,
    inputs,
    outcome,
    run,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike, masked, scores


def less(peak: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return (s - peak(s)).softmax(-1) @ v

    return body


def less_max_of_others(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return attend(s - scores(k, q).amax(-1, keepdim=True), v)


FORMS: list[tuple[str, Body]] = [
    ("less its maximum", less(lambda s: s.amax(-1, keepdim=True).detach())),
    ("less the largest of all", less(lambda s: s.max())),
]


@pytest.mark.parametrize("body", [f[1] for f in FORMS], ids=[f[0].replace(" ", "-") for f in FORMS])
def test_softmax_does_not_see_the_maximum_of_its_operand(body: Body) -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form="matmul + softmax")


def test_another_row_or_head_is_no_constant() -> None:
    """A maximum of each head is one number per query only with the keys in it."""
    q, k, v = inputs()
    for dims, verdict in (((1, 3), "causal"), ((0, 1), "the maximum that is subtracted is not")):

        def body(self: Model, q: Tensor, k: Tensor, v: Tensor, d: Any = dims) -> Tensor:
            s = masked(q, k)
            return (s - s.amax(d, keepdim=True)).softmax(-1) @ v

        _, report = run(Model(body), q, k, v)
        assert outcome(report)[0].startswith(verdict)


LOOKALIKES: list[Row] = [
    ("max over queries", less(lambda s: s.amax(-2, keepdim=True)), "is not one number per query"),
    ("max over heads", less(lambda s: s.amax(1, keepdim=True)), "is not one number per query"),
    ("max, dim lost", less(lambda s: s.amax((0, 1, 3))), "is not one number per query"),
    ("max, dim misplaced", less(lambda s: s.amax(-1)[:, :, None]), "is not one number per query"),
    ("max of others", less_max_of_others, "additive bias"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
