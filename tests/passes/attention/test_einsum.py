"""Einsums that are products of queries and keys, or of probabilities and values."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.attention.einsum import read
from tests.passes.attention.forms import (
    SCALE,
    B,
    D,
    H,
    Model,
    N,
    captured,
    causal,
    check_form,
    hidden,
    inputs,
    result,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike, scores

G, X = 2, 2  # group, key heads


def einsum_by_head(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    s = s.masked_fill(~causal(), -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v)


def einsum_by_token(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    s = s.masked_fill(~causal(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).transpose(1, 2)


def einsum_keys_first(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhjd,bhid->bhij", k, q) * SCALE
    s = s.masked_fill(~causal(), -torch.inf)
    return torch.einsum("bhjd,bhij->bhid", v, s.softmax(-1))


def grouped_einsum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = hidden(torch.einsum("bghid,bgjd->bghij", q.view(B, X, G, N, D), k) * SCALE).softmax(-1)
    return torch.einsum("bghij,bgjd->bghid", p, v).reshape(B, H, N, D)


def group_first(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, X, G, N, D).transpose(1, 2)
    p = hidden(torch.einsum("b g h n d, b h s d -> b g h n s", q, k) * SCALE).softmax(-1)
    return torch.einsum("bghns,bhsd->bhgnd", p, v).reshape(B, H, N, D)


FORMS: list[tuple[str, Body, int]] = [
    ("by head", einsum_by_head, H),
    ("by token", einsum_by_token, H),
    ("keys first", einsum_keys_first, H),
    ("5-D einsum", grouped_einsum, X),
    ("5-D einsum, group first", group_first, X),
]


@pytest.mark.parametrize(
    ("body", "kv_heads"), [f[1:] for f in FORMS], ids=[f[0].replace(" ", "-") for f in FORMS]
)
def test_an_einsum_is_read_as_the_product_that_it_is(body: Body, kv_heads: int) -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form="einsum + softmax", heads=(H, kv_heads), kv_heads=kv_heads)


def talking_heads(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.einsum("bhij,hg->bgij", scores(q, k), self.mix), v)


LOOKALIKES: list[Row] = [
    ("talking heads", talking_heads, "einsum 'bhij,hg->bgij' is not query @ key^T"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)


# Equation, shapes of both operands, and the letter that is summed; None where it is no product.
EQUATIONS: list[tuple[str, tuple[int, ...], tuple[int, ...], str | None]] = [
    ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5), "d"),
    ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5), "d"),
    ("b...d,bjd->b...j", (2, 3, 5), (2, 6, 5), "d"),
    ("id,jd->ijd", (4, 5), (6, 5), None),  # nothing is summed
    ("bid,bjd->ij", (2, 4, 5), (2, 6, 5), None),  # two letters are
    ("bid,jd->ij", (2, 4, 5), (6, 5), None),  # b is summed away on one side
    ("iid,jd->ij", (4, 4, 5), (6, 5), None),  # a diagonal
]


@pytest.mark.parametrize(("equation", "first", "second", "summed"), EQUATIONS, ids=lambda x: str(x))
def test_only_a_product_over_one_letter_is_read(
    equation: str, first: tuple[int, ...], second: tuple[int, ...], summed: str | None
) -> None:
    gm = captured(
        lambda a, b: torch.einsum(equation, a, b), (torch.randn(first), torch.randn(second))
    )
    found = read(result(gm))
    assert (None if found is None else found.summed) == summed
    if found is not None:
        assert found.swapped().left == found.right


def test_an_einsum_of_one_operand_or_three_is_no_product() -> None:
    q, k, v = inputs()
    for body in (
        lambda q, k, v: torch.einsum("bhid->bhdi", q),
        lambda q, k, v: torch.einsum("bhid,bhjd,bhjd->bhij", q, k, v),
    ):
        assert all(read(n) is None for n in captured(body, (q, k, v)).graph.nodes)
