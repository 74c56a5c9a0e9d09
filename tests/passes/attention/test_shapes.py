"""Operands of an attention that do not fit together are declined by what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import (
    NEG,
    B,
    Model,
    N,
    causal,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike, scores


def heads_in_the_batch_and_shared(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0], k[0, ::2], v[0, ::2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def six_dimensions(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(1, (2, 2, 1)) for x in (q, k, v))
    return attend(scores(q, k), v).flatten(1, 3)


def five_dimensions_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1, 2)


def batch_made_by_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:1], k[:1], v[:1]
    s = scores(q, k).masked_fill(~causal().expand(B, 1, N, N), NEG)
    return s.softmax(-1) @ v


def rows_made_by_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (scores(q[:, :, :1], k) + torch.where(causal(), 0.0, NEG)).softmax(-1)
    return s @ v


def in_float64(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q.double(), k.double()), v.double())


def values_of_two_heads_in_turn(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, v = q.unflatten(1, (2, 2)), v[:, None, :2]  # value head h % 2, and one key head
    return attend(scores(q, k[:, None, :1]), v).flatten(1, 2)


LOOKALIKES: list[Row] = [
    ("heads in the batch, shared", heads_in_the_batch_and_shared, "key has fewer heads than query"),
    ("float64", in_float64, "dtype torch.float64 is not float32, bfloat16 or float16"),
    ("values in turn", values_of_two_heads_in_turn, "shared by different groups of heads"),
    ("6-D", six_dimensions, "query has 6 dimensions"),
    ("5-D sdpa", five_dimensions_sdpa, "query has 5 dimensions"),
    ("batch made by the mask", batch_made_by_the_mask, "broadcast the query"),
    ("rows made by the mask", rows_made_by_the_mask, "broadcast the query"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
