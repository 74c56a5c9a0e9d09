"""Masks that a model makes and then writes to: read as they are where attention reads them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import NEG, B, Model, N, causal, inputs, outcome, run

IN_PLACE = "the mask is written to in place"

Mask = Callable[[], Tensor]


def filled_where_it_is_one() -> Tensor:
    mask = torch.ones(N, N).triu(diagonal=1)
    mask.masked_fill_(mask.bool(), NEG)
    return mask


def filled_twice_through_a_view() -> Tensor:
    mask = torch.ones(N, N).triu(diagonal=1)
    mask.masked_fill_(mask.bool(), -torch.inf)
    seen = mask.view(1, 1, N, N)
    seen.masked_fill_(seen < -1, NEG)
    return seen


def put_where_later() -> Tensor:
    mask = torch.zeros(N, N)
    mask[torch.ones(N, N).triu(1).bool()] = -torch.inf
    return mask


def copied_into_a_part() -> Tensor:
    mask = torch.zeros(B, 1, N, N)
    mask[:, :, :, :N] = torch.full((N, N), NEG).triu(1)
    return mask


def copied_through_a_transpose() -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask.T.copy_(torch.ones(N, N, dtype=torch.bool).triu())
    return mask


def copied_before_the_write() -> Tensor:
    mask = causal()
    kept = mask.clone()
    mask[3] = True
    return kept & (mask | ~mask)


def added_to() -> Tensor:
    mask = torch.full((N, N), NEG)
    before = mask * 2
    mask.triu_(1)
    return mask + 0 * before.clamp(min=-1)


CAUSAL: list[Mask] = [
    filled_where_it_is_one,
    filled_twice_through_a_view,
    put_where_later,
    copied_into_a_part,
    copied_through_a_transpose,
    copied_before_the_write,
    added_to,
]


def made_by(mask: Mask) -> Model:
    return Model(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, mask()))


@pytest.mark.parametrize("mask", CAUSAL, ids=[m.__name__ for m in CAUSAL])
def test_a_mask_is_what_was_written_to_it(mask: Mask) -> None:
    model = made_by(mask)
    expected = F.scaled_dot_product_attention(*inputs(), causal())
    torch.testing.assert_close(model(*inputs()), expected, atol=2e-6, rtol=1e-5)
    out, report = run(model, *inputs())
    assert outcome(report) == ["causal"]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def a_view_sees_a_later_write() -> Tensor:
    mask = causal()
    seen = mask.view(1, 1, N, N)
    mask[3] = True
    return seen


def some_keys_for_all() -> Tensor:
    mask = torch.full((N, N), -torch.inf).triu(1)
    mask[:, :3] = 0.0
    return mask


def the_diagonal_is_hidden() -> Tensor:
    mask = causal()
    mask.masked_fill_(mask & mask.T, False)
    return mask


def a_loop_over_rows() -> Tensor:
    mask = torch.full((N, N), -torch.inf)
    for row in range(N):
        mask[row, : row + 1] = 0.0
    return mask


def every_second_row() -> Tensor:
    mask = causal()
    mask[::2] = True
    return mask


def the_diagonal_by_stride() -> Tensor:
    mask = causal()
    mask.diagonal().fill_(False)
    return mask


LOOKALIKES: list[tuple[Mask, str]] = [
    (a_view_sees_a_later_write, "a choice between masks: causal, or Eq(i, 3)"),
    (some_keys_for_all, "prefix-LM"),
    (the_diagonal_is_hidden, "causal with offset -1"),
    (a_loop_over_rows, IN_PLACE),
    (every_second_row, IN_PLACE),
    (the_diagonal_by_stride, IN_PLACE),
]


@pytest.mark.parametrize(
    ("mask", "reason"), LOOKALIKES, ids=[mask.__name__ for mask, _ in LOOKALIKES]
)
def test_a_write_that_changes_the_mask_is_no_look_alike(mask: Mask, reason: str) -> None:
    model = made_by(mask)
    expected = model(*inputs())
    out, report = run(model, *inputs())
    assert outcome(report)[0].startswith(reason), outcome(report)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_each_of_two_attentions_sees_its_own_values_of_one_tensor() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal()
        first = F.scaled_dot_product_attention(q, k, v, mask.clone())
        mask.logical_not_()
        return F.scaled_dot_product_attention(first, k, v, mask[:])

    model = Model(body)
    expected = model(*inputs())
    out, report = run(model, *inputs())
    assert [r.split(":")[0] for r in outcome(report)] == ["causal", "anti-causal"]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_what_the_caller_gives_is_not_the_graphs_own() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask.fill_(True)
        mask.tril_()
        return F.scaled_dot_product_attention(q, k, v, mask)

    out, report = run(Model(body), *inputs(), torch.zeros(N, N, dtype=torch.bool))
    assert outcome(report)[0].startswith(IN_PLACE)
    expected = F.scaled_dot_product_attention(*inputs(), causal())
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(lambda ids: ids + 1, "causal & packed"), (lambda ids: ids.add_(1), IN_PLACE)],
    ids=["reads", "writes"],
)
def test_a_region_under_vmap_is_a_write_only_where_it_writes(function, expected: str) -> None:
    """As a mask of groups of image tokens is made, beside one that is proved."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        ids = ids * 2
        keep = causal() & (ids[:, :, None] == ids[:, None])
        moved = torch.vmap(function)(ids)
        return F.scaled_dot_product_attention(q, k, v, keep[:, None]) + 0 * moved.sum()

    ids = (torch.arange(N) // 9).expand(B, -1).contiguous()
    expected_out = Model(body)(*inputs(), ids)
    out, report = run(Model(body), *inputs(), ids)
    assert outcome(report)[0].startswith(expected), outcome(report)
    torch.testing.assert_close(out, expected_out, atol=2e-6, rtol=1e-5)
