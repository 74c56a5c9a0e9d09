"""Gradients on a GPU (under Triton's interpreter where there is none) against autograd's."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moonfx.kernels import gpu_backward, gpu_index, reference
from moonfx.kernels.gpu_problem import Layout, layout
from moonfx.kernels.policy import Policy
from tests.kernels.test_tiled import TOLERANCE
from tests.moba_cases import FEATURES, Case

NAMES = ("dq", "dk", "dv", "dbias")


def routes_of(query: Tensor, key: Tensor, of: Layout, policy: Policy) -> Tensor:
    """int32 [B, Hkv, R, K] by the definition, from the layout's slots."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk = key.shape[1:3]
    bias = torch.zeros(1) if policy.key_bias is None else policy.key_bias.nan_to_num()
    bias = bias.expand(B, Hq, Nk).unflatten(1, (Hkv, of.group))
    place = torch.arange(Nk).expand(B, Nk) if of.blocks.token is None else of.blocks.token.long()
    keys = key.float().nan_to_num().gather(2, place[:, None, :, None].expand(B, Hkv, Nk, D))
    bias = bias.gather(3, place[:, None, None].expand(B, Hkv, of.group, Nk))
    slot = torch.arange(Nk)
    start, size = of.blocks.start[..., None], of.blocks.size[..., None]
    inside = ((slot >= start) & (slot < start + size)).float()  # [B, n, Nk]
    share = inside / size.clamp(min=1)
    means, biases = share[:, None] @ keys, share[:, None] @ bias.mT  # [B, Hkv, n, D or G]
    index = torch.arange(Nq).expand(B, Nq) if of.queries.index is None else of.queries.index.long()
    rows = query.float().gather(2, index[:, None, :, None].expand(query.shape))
    rows = rows.unflatten(1, (Hkv, of.group)).transpose(2, 3)  # [B, Hkv, Nq, G, D]
    score = torch.einsum("bhqgd,bhnd->bhqgn", rows, means)
    score = score + biases.mT[:, :, None] / (policy.scale or 1.0)
    number = torch.arange(of.n)
    own, first, end = (
        x[:, None, :, None, None] for x in (of.queries.own, of.queries.first, of.queries.end)
    )
    end = end.where(own >= 0, -1)
    able = (number >= first) & (number < end) & (number != own)
    score = score.masked_fill(able & (number < first + of.sinks), torch.inf)
    best = score.masked_fill(~able, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = best.masked_fill(~able.expand(score.shape).gather(-1, best), -1)
    best = torch.nn.functional.pad(best, (0, of.topk), value=-1)[..., : of.topk - 1]
    routes = torch.cat([own.expand(*best.shape[:-1], 1), best], -1)
    return routes.flatten(2, 3).int()


def small(case: Case) -> Case:
    """The interpreter takes a millisecond per operation of a program."""
    length = min(case.length, 48)
    return case.but(kv_heads=1, length=length, queries=min(case.queries, length))


def problem(case: Case) -> tuple[Any, ...]:
    """What the kernel is given after the gradients."""
    inputs, policy = case.inputs(), case.policy()
    with torch.no_grad():
        out, lse = reference.moba_attention(*inputs, **policy._asdict())
    of = layout(inputs[0], inputs[1], policy)
    index = None
    if of.n > 1:
        index = gpu_index.build(routes_of(*inputs[:2], of, policy), of.n)
    return *inputs, out, lse, of, index, policy


def upstream(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients on the grid: exact in every dtype."""
    return (torch.randint(-8, 9, out.shape) / 8).to(out), (torch.randint(-8, 9, lse.shape) / 8).to(
        lse
    )


def assert_like_reference(case: Case) -> None:
    given = problem(case)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    bias = case.full_bias()
    policy = case.policy()._asdict() | {"key_bias": bias}
    out, lse = reference.moba_attention(*leaves, **policy)
    grads = upstream(out, lse)
    leaves += [] if bias is None else [bias]
    expected = torch.autograd.grad((out, lse), leaves, grads)
    got = [grad for grad in gpu_backward.gradients(*grads, *given) if grad is not None]
    for name, mine, theirs in zip(NAMES[: len(expected)], got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        torch.testing.assert_close(
            mine, theirs, **TOLERANCE[case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_equals_the_reference(case: Case) -> None:
    assert_like_reference(small(case))
