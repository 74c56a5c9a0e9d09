"""Heads that lie in the batch are counted by the views that laid them there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.attention.heads import folded_heads, heads_in_batch, views_itself
from tests.passes.attention.forms import (
    SCALE,
    B,
    D,
    H,
    Model,
    N,
    captured,
    check_form,
    hidden,
    result,
)


def in_the_batch(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).view(B, H, N, D)


def in_the_batch_by_hand(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (hidden(q @ k.transpose(1, 2) * SCALE).softmax(-1) @ v).unflatten(0, (B, H))


def test_heads_in_the_batch_are_counted() -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(in_the_batch, expected, form="sdpa")
    check_form(in_the_batch_by_hand, expected, form="matmul + softmax")


# Name, a view of [B, H, N, N], and the heads that it folds into the batch.
VIEWS: list[tuple[str, Callable[[Tensor], Tensor], int | None]] = [
    ("folded", lambda s: s.view(B * H, N, N), H),
    ("flattened", lambda s: s.flatten(0, 1), H),
    ("heads with queries", lambda s: s.view(B, H * N, N), None),
    ("queries cut", lambda s: s.reshape(B * H, N // 2, 2 * N), None),
    ("itself", lambda s: s.view(B, H, N, N), None),
    ("transposed", lambda s: s.transpose(2, 3), None),
]


@pytest.mark.parametrize(("view", "heads"), [v[1:] for v in VIEWS], ids=[v[0] for v in VIEWS])
def test_a_view_folds_heads_only_where_queries_and_keys_stay(
    view: Callable[[Tensor], Tensor], heads: int | None
) -> None:
    assert folded_heads(result(captured(view, (torch.zeros(B, H, N, N),)))) == heads


def test_a_view_of_scores_by_head_is_the_same_fold_the_other_way() -> None:
    gm = captured(lambda s: s.view(B, H, N, N), (torch.zeros(B * H, N, N),))
    assert folded_heads(result(gm)) == H


def test_only_a_view_of_the_shape_that_it_has_views_itself() -> None:
    given = (torch.zeros(B, N, N),)
    assert views_itself(result(captured(lambda s: s.view(B, N, N), given)))
    assert not views_itself(result(captured(lambda s: s.view(N, B, N), given)))
    assert not views_itself(result(captured(lambda s: s * 1.0, given)))


# Name, what a query in the batch was made of, and its heads.
QUERIES: list[tuple[str, Callable[[Tensor], Tensor], tuple[int, ...], int | None]] = [
    ("by head", lambda q: q.view(B * H, N, D) * SCALE, (B, H, N, D), H),
    ("by token", lambda q: q.view(N, B * H, D).transpose(0, 1), (N, B, H * D), H),
    ("no heads", lambda q: q * SCALE, (B, N, D), None),
    ("tokens cut", lambda q: q.view(2 * N, B * H, D // 2).transpose(0, 1), (N, B, H * D), None),
    ("rolled", lambda q: q.view(B * H, N, D).roll(1, 0), (B, H, N, D), None),
]


@pytest.mark.parametrize(
    ("made", "shape", "heads"), [q[1:] for q in QUERIES], ids=[q[0] for q in QUERIES]
)
def test_heads_in_the_batch_of_a_query_are_read_from_its_view(
    made: Callable[[Tensor], Tensor], shape: tuple[int, ...], heads: int | None
) -> None:
    assert heads_in_batch(result(captured(made, (torch.zeros(shape),)))) == heads
