"""The best scores by columns of a tile, under Triton's interpreter, and when they are unsure."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu import route_by_column as gpu_route_by_column
from moonfx.kernels.gpu.problem import layout
from moonfx.kernels.gpu.route_by_column import keep, keys, no_keys, settle
from tests.support.routes import ROADS, take

COLUMNS, TILES = 16, 9


@triton.jit
def columns_kernel(score, blocks, unsure, STEPS: tl.constexpr, COLUMNS: tl.constexpr):
    """16 rows of scores [16, (STEPS + 1) * COLUMNS]: 7 blocks of each."""
    row = tl.arange(0, 16)
    free = tl.full([16], 7, tl.int32)
    kept = no_keys(16, COLUMNS)
    for step in range(9):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        tile = tl.load(score + row[:, None] * (9 * COLUMNS) + column[None, :])
        kept = keep(kept, keys(tile, step, STEPS))
    best, doubt = settle(kept, free, 0, STEPS, 8, COLUMNS)
    tl.store(blocks + row[:, None] * 8 + tl.arange(0, 8)[None, :], best)
    tl.store(unsure, doubt)


def by_column(score: Tensor) -> tuple[list[list[int]], int]:
    """The blocks of each row [16, 9 * 16] that columns find, ascending, and if one is unsure."""
    blocks = torch.empty(16, 8, dtype=torch.int32)
    unsure = torch.empty(1, dtype=torch.int32)
    columns_kernel[(1,)](score.contiguous(), blocks, unsure, STEPS=15, COLUMNS=COLUMNS)
    return [sorted(x for x in row if x >= 0) for row in blocks.tolist()], int(unsure)


def spread() -> Tensor:
    """Scores whose seven best lie in seven columns, on both sides of zero."""
    score = torch.arange(16 * TILES * COLUMNS).view(16, -1).remainder(1009) / 1009 - 2.0
    score[:, 3:66:9] = torch.arange(7) / 4 - 0.75
    return score


def test_columns_find_the_best_and_know_when_they_may_not() -> None:
    best = spread().topk(7).indices.sort(-1).values.tolist()
    assert by_column(spread()) == (best, 0)

    few = torch.full_like(spread(), -torch.inf)
    few[:, 20:22] = 1.0
    assert by_column(few) == ([[20, 21]] * 16, 0)  # not more than there are places: no doubt

    tied = spread()
    tied[5] = 1.0
    assert by_column(tied)[1] == 1

    close = spread()
    close[5, 100] = close[5, 3] * (1 + 2**-22)  # hardly worse, in another column
    assert by_column(close)[1] == 1

    crowded = spread()
    crowded[5, 2::COLUMNS] = torch.arange(TILES) + 5.0  # nine in a column of three places
    assert by_column(crowded)[1] == 1


def test_negative_zero_ties_with_zero_in_columns() -> None:
    score = spread()
    score[:, 3:66:9] = 1.0
    score[:, 59] = -0.0
    score[:, 75] = 0.0
    score[:, 3] = -5.0
    assert by_column(score)[1] == 1


@pytest.mark.parametrize("largest", [0, 8], ids=["without columns", "with columns"])
@pytest.mark.parametrize("causal", [True, False])
def test_columns_change_no_route(
    largest: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(ROADS[0], monkeypatch)
    query, key = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 300, 16)
    query = query if causal else torch.randn(1, 2, 300, 16)
    of = layout(query, key, MobaArguments(2, 7, 1, causal=causal))
    means = gpu_means.block_means(key, of)
    monkeypatch.setattr(gpu_route_by_column, "TABLE", largest)
    got = gpu_route.route(query, means, None, of, 1.0)
    monkeypatch.setattr(gpu_route, "MOST", 0)
    assert torch.equal(got, gpu_route.route(query, means, None, of, 1.0))
