"""Dimensions, operators and writes around attention that are not read, and what is no attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import NEG, B, D, H, Model, N, causal, inputs, outcome, run
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike, scores


def keys_by_one_group_values_by_another(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head (x, y) with key head x and value head y."""
    q = q.unflatten(1, (2, 2))
    return attend(scores(q, k[:, :2, None]), v[:, None, :2]).flatten(1, 2)


def mask_by_half_of_the_head(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    keep = torch.stack([causal(), causal() & (torch.arange(N) > 0)])  # [2, N, N]: by group
    s = scores(q, k[:, :2, None]).masked_fill(~keep, NEG)
    return (s.softmax(-1) @ v[:, :2, None]).flatten(1, 2)


def keys_changed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1.0
    s = scores(q, k)
    k.zero_()
    return attend(s, v) + k


def query_changed_through_a_view(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.0
    first, _ = q.split(N // 2, dim=2)
    s = scores(q, k)
    first.add_(1.0)
    return attend(s, v)


def linear_attention(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.transpose(2, 3).softmax(-1) @ v)


def router(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q.transpose(1, 2).reshape(B * N, H * D)
    weight, _ = F.linear(x, self.gate).softmax(-1).topk(2)
    return (weight / weight.sum(-1, keepdim=True)).sum() * v


def loss(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q.transpose(1, 2).reshape(B * N, H * D) @ self.gate.T
    return -(logits.softmax(-1).log()[:, 0]).mean()


@torch.library.custom_op("moonfx_test::own_attention", mutates_args=())
def own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@own_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def unknown_operator(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return own_attention(q, k, v)


def flash_for_cpu(**given: Any) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, is_causal=True, **{x: y for x, y in given.items() if x != "lse"})
        return out + lse[..., None] if "lse" in given else out

    return body


def exp_feature_map(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention: exp() of queries and keys, not of their product."""
    return q.exp() @ (k.exp().transpose(2, 3) @ v)


def log_likelihood(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Perplexity: exp() of scores that enters no product."""
    return scores(q, k).log_softmax(-1).mean().neg().exp() + v


LOOKALIKES: list[Row] = [
    ("two groupings", keys_by_one_group_values_by_another, "shared by different groups of heads"),
    ("mask by half a head", mask_by_half_of_the_head, "cut in two differs by head"),
    ("keys changed", keys_changed, "key is written to in place"),
    ("query changed", query_changed_through_a_view, "query is written to in place"),
    ("an operator of its own", unknown_operator, "the operator moonfx_test::own_attention is not"),
    ("flash and its sums", flash_for_cpu(lse=True), "more than the output of the operator"),
    ("flash, negative scale", flash_for_cpu(scale=-1.0), "the scores are scaled by -1.0"),
    ("exp as a feature map", exp_feature_map, None),
    ("perplexity", log_likelihood, None),
    ("linear attention", linear_attention, None),
    ("router", router, None),
    ("loss", loss, None),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)


def test_a_router_beside_attention_is_passed_over() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        weight, chosen = F.linear(y, self.gate).softmax(-1).topk(2)
        expert = self.experts[chosen]  # [B, N, 2, H * D, H * D]
        return (weight[..., None, None] * expert).sum(2).matmul(y[..., None])[..., 0]

    generator = torch.Generator().manual_seed(1)
    model = Model(
        body,
        gate=torch.randn(8, H * D, generator=generator),
        experts=torch.randn(8, H * D, H * D, generator=generator),
    )
    _, report = run(model, *inputs())
    assert outcome(report) == ["causal"]
