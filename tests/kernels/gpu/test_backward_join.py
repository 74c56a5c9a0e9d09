"""Sums of dK, dV and the bias that are made in parts add up to the same, in one order."""

import pytest
import torch

pytest.importorskip("triton")

from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu import backward_schedule as gpu_backward_plan
from tests.support.gpu_backward import assert_like_reference, problem, random
from tests.support.moba_cases import Case


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_list_that_is_cut_adds_up_to_the_same(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=1, topk=3, sinks=1, length=64, queries=64, bias=bias, scale=0.25)
    monkeypatch.setattr(gpu_backward_plan, "SHORT", 16)
    monkeypatch.setattr(gpu_backward_plan, "SPLIT", 1 << 17)  # 32 tiles or more
    given = problem(case)
    of, index = given[5:7]
    todo = gpu_backward_plan.plan(index, of, 2, 16, 1 << 10)
    assert (todo.items[:, 6] > 1).any()  # parts
    assert_like_reference(case)
    runs = [gpu_backward.gradients(*random(case)) for _ in range(2)]
    for once, again in zip(*runs, strict=True):
        assert once is again is None or torch.equal(once, again)
