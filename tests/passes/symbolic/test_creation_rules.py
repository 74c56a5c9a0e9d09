"""What is made of an index: read as what torch makes, or not read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.reading import assert_read_exactly, read

KNOWN: list[tuple[str, Callable[[], Tensor]]] = [
    ("arange", lambda: torch.arange(5)),
    ("arange from a start", lambda: torch.arange(2, 7)),
    ("arange by a step", lambda: torch.arange(3, 12, 2)),
    ("arange downwards", lambda: torch.arange(5, 0, -1)),
    ("full", lambda: torch.full((2, 3), 7)),
    ("full of -inf", lambda: torch.full((2,), -torch.inf)),
    ("full of a number that float32 rounds", lambda: torch.full((2,), 0.1)),
    ("full_like", lambda: torch.full_like(torch.zeros(2), 3)),
    ("new_full", lambda: torch.zeros(2).new_full((3,), 4)),
    ("zeros and ones", lambda: torch.zeros(2, 3) - torch.ones_like(torch.zeros(3))),
    ("scalar_tensor", lambda: torch.scalar_tensor(2.5) * torch.ones(2)),
    ("cumsum of ones", lambda: torch.ones(2, 4).cumsum(1)),
    ("cumsum along the first dim", lambda: torch.full((4, 2), 3).cumsum(0)),
    ("tril", lambda: torch.ones(4, 5).tril(1)),
    ("tril of a bool", lambda: torch.ones(4, 5, dtype=torch.bool).tril(-1)),
    ("triu", lambda: torch.full((4, 4), -torch.inf).triu(1)),
    ("diff", lambda: torch.arange(5).diff(prepend=torch.tensor([-1]))),
    ("diff of steps", lambda: (torch.arange(5) * 3).diff(prepend=torch.tensor([0]))),
]


@pytest.mark.parametrize("make", [k[1] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_it_is_read_as_what_torch_makes(make: Callable[[], Tensor]) -> None:
    assert_read_exactly(make)


UNKNOWN: list[tuple[str, Callable[[], Tensor]]] = [
    ("arange by a part of one", lambda: torch.arange(0, 2, 0.5)),
    ("cumsum of what grows", lambda: torch.arange(5).cumsum(0)),
    ("cumsum of halves", lambda: torch.full((4,), 0.5).cumsum(0)),
    ("diff without what is before", lambda: torch.arange(5).diff()),
    ("diff of two before", lambda: torch.arange(5).diff(prepend=torch.tensor([-2, -1]))),
    ("diff of diffs", lambda: torch.arange(5).diff(n=2, prepend=torch.tensor([-1]))),
    (
        "diff with something after",
        lambda: torch.arange(5).diff(prepend=torch.tensor([-1]), append=torch.tensor([9])),
    ),
    ("arange in bfloat16", lambda: torch.arange(5, dtype=torch.bfloat16)),
]


@pytest.mark.parametrize("make", [u[1] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_what_is_not_known_exactly_is_a_leaf(make: Callable[[], Tensor]) -> None:
    assert read(make).unknown
