"""What the backward needs of each row: its logsumexp, and delta = rowsum(dO O) - dlse."""

import math

import pytest
import torch

pytest.importorskip("triton")

from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu.backward_preprocess import statistics
from tests.support.gpu_backward import (
    problem,
    upstream,
)
from tests.support.moba_cases import Case


def test_a_missing_lse_gradient_is_zero() -> None:
    given = problem(Case(batch=1, kv_heads=1, topk=3))
    grad_out, grad_lse = upstream(*given[3:5])
    without = gpu_backward.gradients(grad_out, None, *given)
    with_zero = gpu_backward.gradients(grad_out, torch.zeros_like(grad_lse), *given)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_zero[:3], strict=True))


@pytest.mark.parametrize("padding", ["none", "one row empty"])
@pytest.mark.parametrize("packing", ["none", "interleaved"])
def test_each_row_has_its_logsumexp_in_base_two_and_its_delta(padding: str, packing: str) -> None:
    case = Case(kv_heads=2, topk=3, padding=padding, packing=packing, value_dim=5)
    _, _, _, out, lse, of, *_ = problem(case)
    grad_out, grad_lse = upstream(out, lse)
    found = statistics(grad_out, grad_lse, out, lse, of)
    assert found.shape == (2, 2, 81, 2)
    delta = (grad_out * out).sum(-1) - grad_lse
    natural = lse.masked_fill(lse.isneginf(), torch.inf)
    delta = delta.masked_fill(lse.isneginf(), 0.0)
    for index, expected in ((0, natural / math.log(2)), (1, delta)):
        if of.queries.index is not None:
            order = of.queries.index[:, None].long().expand_as(expected)
            expected = expected.gather(2, order)
        rows = expected.unflatten(1, (2, 2)).transpose(2, 3).flatten(2)  # [B, Hkv, Nq G]
        torch.testing.assert_close(found[:, :, :-1, index], rows, atol=1e-5, rtol=1e-5)
    assert found[:, :, -1].tolist() == [[[math.inf, 0.0]] * 2] * 2  # the row that is none
