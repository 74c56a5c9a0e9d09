"""The gradient of queries: a row's routes are summed in order, whatever the passes are."""

import pytest
import torch

pytest.importorskip("triton")

from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu import block_index as gpu_index
from tests.support.gpu_backward import (
    problem,
    random,
    upstream,
)
from tests.support.moba_cases import Case


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of a pass, to be set; each element that is appended is one number of passes."""
    original, counts = gpu_index.passes, [gpu_index.BUDGET]

    def passes(index: gpu_index.Index, width: int) -> list[gpu_index.Pass]:
        found = list(original(index, width, counts[0]))
        counts.append(len(found))
        return found

    monkeypatch.setattr(gpu_index, "passes", passes)
    return counts


def test_gradients_repeat_bit_for_bit_in_any_number_of_passes(budgets: list[int]) -> None:
    case = Case(batch=1, kv_heads=2, topk=3, sinks=1, bias="all", scale=0.25)
    given, runs = random(case, chunks=True), []
    for budgets[0] in (1 << 28, 1 << 28, 1 << 12, 1):
        runs.append(gpu_backward.gradients(*given))
    assert budgets[1:3] == [1, 1]
    assert 1 < budgets[3] < budgets[4]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("topk", [1, 3], ids=["own block", "routed"])
def test_it_is_stored_by_token_in_the_querys_dtype(topk: int) -> None:
    given = problem(
        Case(batch=1, kv_heads=1, topk=topk, dtype=torch.bfloat16, length=24, queries=9)
    )
    dq, *_ = gpu_backward.gradients(*upstream(*given[3:5]), *given)
    assert (dq.dtype, dq.shape) == (torch.bfloat16, given[0].shape)
    assert dq.transpose(1, 2).is_contiguous()


def test_a_row_has_the_sum_of_what_its_heads_blocks_give() -> None:
    """With gradients of one row alone, the other rows get nothing."""
    given = problem(Case(batch=1, kv_heads=1, group=2, topk=3))
    grad_out, grad_lse = (torch.zeros_like(x) for x in upstream(*given[3:5]))
    grad_out[:, 1, 30] = 1.0
    dq, *_ = gpu_backward.gradients(grad_out, grad_lse, *given)
    assert dq[:, 1, 30].ne(0).any()
    dq[:, 1, 30] = 0.0
    assert dq.eq(0).all()
