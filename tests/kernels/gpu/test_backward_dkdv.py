"""Gradients of keys, values and biases: the sum over a group, and nothing for padding."""

import pytest
import torch

pytest.importorskip("triton")

from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu.problem import layout
from tests.support.gpu_backward import index_of, problem, random, routes_of, upstream
from tests.support.moba_cases import Case


def test_a_group_sums_what_its_heads_give_alone() -> None:
    case = Case(batch=1, kv_heads=1, group=3, topk=1, bias="all", scale=0.25)
    given = random(case)
    _, _, query, key, value, *_, arguments = given
    of = layout(query, key.expand(-1, 3, -1, -1), arguments)
    index = index_of(routes_of(query, key.expand(-1, 3, -1, -1), of, arguments), of.n)
    wide = [x.expand(-1, 3, -1, -1) for x in (key, value)]
    together = gpu_backward.gradients(*given)
    alone = gpu_backward.gradients(*given[:3], *wide, *given[5:7], of, index, arguments)
    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
    torch.testing.assert_close(together[0], alone[0], **close)
    torch.testing.assert_close(together[1], alone[1].sum(1, keepdim=True), **close)
    torch.testing.assert_close(together[2], alone[2].sum(1, keepdim=True), **close)
    torch.testing.assert_close(together[3], alone[3], **close)


@pytest.mark.parametrize("topk", [3, 9])
def test_padding_and_rows_that_see_nothing_get_zero(topk: int) -> None:
    case = Case(kv_heads=1, topk=topk, padding="one row empty", bias="all", scale=0.25)
    given, mask = problem(case), case.key_mask()
    assert mask is not None
    dq, dk, dv, dbias = gpu_backward.gradients(*upstream(*given[3:5]), *given)
    assert dq[given[4].isneginf()].eq(0).all()
    assert given[4].isneginf().any()
    for grad in (dk, dv):
        assert grad.transpose(1, 2)[~mask].eq(0).all()
        assert grad.transpose(1, 2).is_contiguous()
    assert dbias is not None
    assert dbias.transpose(1, 2)[~mask].eq(0).all()


def test_keys_that_no_row_chose_get_nothing() -> None:
    """Of one query, which sees its own block and a sink: the blocks between have no rows."""
    case = Case(batch=1, kv_heads=1, queries=1, length=64, topk=2, sinks=1, bias="all", scale=0.25)
    given = problem(case)
    _, dk, dv, dbias = gpu_backward.gradients(*upstream(*given[3:5]), *given)
    assert dbias is not None
    for grad in (dk, dv, dbias[..., None]):
        assert grad[:, :, 8:56].eq(0).all()
        assert grad[:, :, :8].ne(0).any()
        assert grad[:, :, 56:].ne(0).any()
