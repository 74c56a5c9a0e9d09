"""Masks made at random of parts: of right ones what they compute, with a wrong one never."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.masks.traced_masks import (
    CAUSAL,
    PADDED,
    B,
    columns,
    float_mask,
    real_keys,
    rows,
    trace,
    verdict,
)

Part = Callable[[Tensor, Tensor, int, int, Tensor], Tensor]

# Parts of a mask over rows i [n, 1], columns j [1, k], lengths n and k, and real [B, 1, 1, k].
CAUSAL_PARTS: list[Part] = [
    lambda i, j, n, k, m: j <= i + (k - n),
    lambda i, j, n, k, m: ~(j > i + (k - n)),
    lambda i, j, n, k, m: (i - j) + k >= n,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool).tril(k - n),
    lambda i, j, n, k, m: torch.where(j > i + (k - n), -1e9, 0.0) == 0,
]
HARMLESS_PARTS: list[Part] = [
    lambda i, j, n, k, m: j >= 0,
    lambda i, j, n, k, m: i < n,
    lambda i, j, n, k, m: j < k + i,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool),
]
PADDING_PARTS: list[Part] = [
    lambda i, j, n, k, m: m,
    lambda i, j, n, k, m: ~(~m),
    lambda i, j, n, k, m: m.long() > 0,
    lambda i, j, n, k, m: m[..., torch.arange(k)],
]
WRONG_PARTS: list[Part] = [
    lambda i, j, n, k, m: j < i + (k - n),
    lambda i, j, n, k, m: j <= i + (k - n) - 1,
    lambda i, j, n, k, m: j + i >= 2,
    lambda i, j, n, k, m: j * 2 <= i + k,
    lambda i, j, n, k, m: j >= i + (k - n) - 2,
    lambda i, j, n, k, m: i + j != 3,
    lambda i, j, n, k, m: j < 4,
    lambda i, j, n, k, m: i > 0,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool).triu(),
    lambda i, j, n, k, m: m.transpose(-1, -2)[..., -n:, :],
]
JOINS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a & b,
    lambda a, b: torch.logical_and(a, b),
    lambda a, b: ~(~a | ~b),
    lambda a, b: torch.where(a, b, False),
    lambda a, b: (a * b) != 0,
    lambda a, b: b.masked_fill(~a, False),
    lambda a, b: (float_mask(a) + float_mask(b)) == 0,
]
FINISHES: list[Callable[[Tensor], Tensor]] = [lambda keep: keep, float_mask]


@st.composite
def right_masks(draw: Any) -> tuple[list[Part], list[Any], Any]:
    parts = [
        draw(st.sampled_from(CAUSAL_PARTS)),
        *draw(st.lists(st.sampled_from(HARMLESS_PARTS + PADDING_PARTS + CAUSAL_PARTS), max_size=3)),
    ]
    parts = draw(st.permutations(parts))
    joins = [draw(st.sampled_from(JOINS)) for _ in parts[1:]]
    return parts, joins, draw(st.sampled_from(FINISHES))


def compose(parts: list[Part], joins: list[Any], finish: Any) -> Callable[..., Tensor]:
    def mask(n: int, k: int, real: Tensor) -> Tensor:
        given = rows(n), columns(k), n, k, real_keys(real)
        keep = parts[0](*given).expand(B, 1, n, k)
        for part, join in zip(parts[1:], joins, strict=True):
            keep = join(keep, part(*given).expand(B, 1, n, k))
        return finish(keep)

    return mask


SIZES = st.sampled_from([(9, 9), (4, 9)])


@settings(max_examples=25)
@given(made=right_masks(), size=SIZES, dynamic=st.booleans())
def test_masks_made_of_supported_parts_are_classified_as_what_they_compute(
    made: Any, size: tuple[int, int], dynamic: bool
) -> None:
    expected = PADDED if any(part in PADDING_PARTS for part in made[0]) else CAUSAL
    assert verdict(trace(compose(*made), *size, dynamic=dynamic, padding=True)) == expected


@settings(max_examples=25)
@given(made=right_masks(), wrong=st.sampled_from(WRONG_PARTS), at=st.integers(0, 3), size=SIZES)
def test_masks_with_one_wrong_part_are_never_supported(
    made: Any, wrong: Part, at: int, size: tuple[int, int]
) -> None:
    parts, joins, finish = made
    parts = [*parts[:at], wrong, *parts[at:]]
    joins = [*joins, JOINS[0]]
    got = verdict(trace(compose(parts, joins, finish), *size, dynamic=False, padding=True))
    assert got not in (CAUSAL, PADDED)
