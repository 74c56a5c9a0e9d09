"""Padding that is given by lengths: keys of a row up to its length, and what only looks like it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from tests.passes.attention.forms import B, Model, N, causal, inputs, outcome, run

LENGTHS = torch.tensor([N, N - 7])
PADDED = "causal & padding"

# keep [.., N, N] of rows i [N, 1], columns j [N] and lengths n [B, 1]
Keep = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: list[tuple[str, Keep]] = [
    ("below the length", lambda i, j, n: j < n),
    ("not at or above it", lambda i, j, n: ~(n <= j)),
    ("places from the end", lambda i, j, n: N - 1 - j >= N - n),
    ("narrow lengths", lambda i, j, n: j < n.to(torch.uint8)),
    ("counted", lambda i, j, n: j < (j < n).sum(1, keepdim=True)),
    ("two bounds", lambda i, j, n: (j < n) & (j < n + 3)),
]


def masked_by(keep: Keep, both_ways: bool = False) -> Model:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        i, j = torch.arange(N)[:, None], torch.arange(N)
        mask = keep(i, j, lengths[:, None])
        mask = mask[:, None, None] if mask.shape == (B, N) else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask if both_ways else mask & (j <= i))

    return Model(body)


@pytest.mark.parametrize("keep", [s[1] for s in SPELLINGS], ids=[s[0] for s in SPELLINGS])
def test_lengths_are_padding(keep: Keep) -> None:
    q, k, v = inputs()
    real = torch.arange(N) < LENGTHS[:, None]
    out, report = run(masked_by(keep), q, k, v, LENGTHS, block=4, topk=2)
    assert outcome(report) == [PADDED]
    expected = moonfx.moba_attention(q, k, v, 4, 2, key_mask=real)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_padding_before_a_row_is_read_from_its_length() -> None:
    q, k, v = inputs()
    out, report = run(masked_by(lambda i, j, n: j >= N - n), q, k, v, LENGTHS, block=4, topk=2)
    assert outcome(report) == [PADDED]
    real = torch.arange(N) >= N - LENGTHS[:, None]
    expected = moonfx.moba_attention(q, k, v, 4, 2, key_mask=real)
    seen = real[:, None, :, None]
    torch.testing.assert_close(out * seen, expected * seen, atol=2e-6, rtol=1e-5)


def test_one_length_for_all_rows_is_padding() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        keep = causal() & (torch.arange(N) < lengths[1])
        return F.scaled_dot_product_attention(q, k, v, keep)

    q, k, v = inputs()
    out, report = run(Model(body), q, k, v, LENGTHS, block=4, topk=2)
    assert outcome(report) == [PADDED]
    real = (torch.arange(N) < LENGTHS[1]).expand(B, -1)
    expected = moonfx.moba_attention(q, k, v, 4, 2, key_mask=real)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


LOOKALIKES: list[tuple[str, Model, str]] = [
    (
        "of the queries",
        masked_by(lambda i, j, n: (i < n[..., None]).expand(B, N, N)),
        "whole queries are masked by",
    ),
    (
        "of query and key",
        masked_by(lambda i, j, n: i + j < n[..., None]),
        "the mask compares positions with values read from",
    ),
    (
        "from the query on",
        masked_by(lambda i, j, n: j > i - n[..., None]),
        "the mask compares positions with values read from",
    ),
    (
        "a prefix",
        masked_by(lambda i, j, n: (j <= i) | (j < n[..., None]), both_ways=True),
        "prefix-LM: the keys of a prefix",
    ),
    ("alone", masked_by(lambda i, j, n: j < n, both_ways=True), "bidirectional"),
]


@pytest.mark.parametrize(
    ("model", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_what_only_looks_like_padding_is_declined_by_name(model: Model, reason: str) -> None:
    expected = model(*inputs(), LENGTHS)
    out, report = run(model, *inputs(), LENGTHS)
    assert outcome(report)[0].startswith(reason), outcome(report)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
