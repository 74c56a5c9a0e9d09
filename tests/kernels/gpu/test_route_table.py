"""The best blocks of a row, kept in a small table: which come in, and how they leave."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu.route_table import empty, put, ranked, write


@triton.jit
def best_of(score, places, blocks, SIZE: tl.constexpr, STEPS: tl.constexpr, TABLE: tl.constexpr):
    """The blocks of 4 rows of scores [4, STEPS * SIZE], put SIZE at a time."""
    row = tl.arange(0, 4)
    scores, found, worst = empty(tl.load(places + row), TABLE, tl.float32)
    for step in range(STEPS):
        column = step * SIZE + tl.arange(0, SIZE)
        new = ranked(tl.load(score + row[:, None] * (STEPS * SIZE) + column[None, :]))
        scores, found, worst = put(scores, found, worst, new, column[None, :])
    tl.store(blocks + row[:, None] * TABLE + tl.arange(0, TABLE)[None, :], found)


def best(score: Tensor, places: list[int]) -> list[list[int]]:
    """The blocks of each row, ascending."""
    blocks = torch.empty(4, 8, dtype=torch.int32)
    steps = score.shape[1] // 16
    best_of[(1,)](
        score, torch.tensor(places, dtype=torch.int32), blocks, SIZE=16, STEPS=steps, TABLE=8
    )
    return [sorted(x for x in row if x >= 0) for row in blocks.tolist()]


def drawn() -> Tensor:
    return torch.randn(4, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("places", [[8, 5, 1, 0], [3, 3, 3, 3]], ids=str)
def test_a_table_has_the_best_of_all_that_was_put(places: list[int]) -> None:
    score = drawn()
    expected = [sorted(row.topk(k).indices.tolist()) for row, k in zip(score, places, strict=True)]
    assert best(score, places) == expected


def test_a_tie_goes_to_the_lower_block_within_a_step_and_across_steps() -> None:
    score = torch.zeros(4, 48)
    score[1, 40], score[2, 3], score[3, [17, 45]] = 1.0, -1.0, 1.0
    assert best(score, [3] * 4) == [[0, 1, 2], [0, 1, 40], [0, 1, 2], [0, 17, 45]]
    score = torch.zeros(4, 48)
    score[:, 5] = -0.0
    assert best(score, [7] * 4) == [list(range(7))] * 4


def test_a_nan_and_minus_infinity_come_after_every_number() -> None:
    score = torch.full((4, 48), torch.nan)
    score[0, 30], score[1, [2, 47]], score[2, 9] = -3e38, 1.0, torch.inf
    score[3] = -torch.inf
    assert best(score, [2] * 4) == [[0, 30], [2, 47], [0, 9], [0, 1]]


@triton.jit
def write_all(
    routes, own, first, end, blocks, topk, sinks, slots, TABLE: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.arange(0, 4)
    chosen = tl.load(blocks + row[:, None] * TABLE + tl.arange(0, TABLE)[None, :])
    load_own, load_first, load_end = tl.load(own + row), tl.load(first + row), tl.load(end + row)
    write(
        routes, row, 3, load_own, load_first, load_end, chosen, topk, sinks, slots, TABLE, COLUMNS
    )


def test_routes_are_the_own_block_the_sinks_and_the_table_in_ascending_order() -> None:
    """Of three rows; a fourth of the tile is none, and nothing is written for it."""
    routes = torch.full((4, 5), 99, dtype=torch.int32)
    own, first, end = (
        torch.tensor(x, dtype=torch.int32) for x in ([9, 1, -1, 3], [2, 0, 0, 0], [9, 1, 0, 3])
    )
    blocks = torch.tensor([[7, 5], [-1, -2], [-1, -2], [1, 2]], dtype=torch.int32)
    write_all[(1,)](routes, own, first, end, blocks, 5, 2, 2, TABLE=2, COLUMNS=4)
    assert routes.tolist() == [
        [9, 2, 3, 5, 7],
        [1, 0, -1, -1, -1],
        [-1, -1, -1, -1, -1],
        [99] * 5,
    ]
