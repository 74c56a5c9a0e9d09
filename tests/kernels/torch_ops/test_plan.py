"""Which tiles a pass works off: every route once, one block a tile, none larger than it need be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonfx.kernels.torch_ops.plan import TILE, TilePlan, cut, longest_first, tile_rows


@pytest.mark.parametrize(
    ("rows", "size"), [(0, 1), (1, 1), (2, 2), (3, 4), (100, TILE), (TILE, TILE), (1000, TILE)]
)
def test_a_tile_is_a_power_of_two_of_rows_and_no_larger_than_a_block_fills(
    rows: int, size: int
) -> None:
    assert tile_rows(rows) == size


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_every_route_is_in_one_tile_of_its_block(
    count: int, slots: int, blocks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    route = torch.randint(0, blocks + 1, (count, slots), generator=generator)
    rows, block, place = cut(route, blocks)
    assert (place.shape, block.shape) == (route.shape, rows.shape[:1])
    found = []
    for tile, its in enumerate(rows.tolist()):
        found += [(int(block[tile]), row) for row in its if row < count]
    expected = [(j, row) for row, its in enumerate(route.tolist()) for j in its if j < blocks]
    assert sorted(found) == sorted(expected)
    # A route's result lies where its row is, in a tile of its block.
    flat = torch.cat([rows.flatten(), torch.tensor([-1])])
    for row, slot in (route < blocks).nonzero().tolist():
        at = int(place[row, slot])
        assert flat[at] == row
        assert block[at // rows.shape[1]] == route[row, slot]
    assert place[route == blocks].eq(rows.numel()).all()


def test_tiles_that_read_most_keys_come_first_and_equal_ones_in_order() -> None:
    seen = torch.tensor([[2, 1], [5, 1], [2, 2]])
    made = longest_first(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 1), seen)
    assert (made.turn.tolist(), made.extents) == ([1, 0, 2], [5, 2, 2])


def plan_of(extents: list[int], seen: torch.Tensor | None = None) -> TilePlan:
    count = len(extents)
    rows, start = torch.zeros(count, 2, dtype=torch.int64), torch.tensor([0, 4, 8, 12][:count])
    return TilePlan(rows, start, torch.arange(count), extents, torch.zeros(2, 1), seen)


@pytest.mark.parametrize("budget", [1, 4 * 5 * 6 * 2, 1 << 20])
def test_batches_hold_every_tile_once_and_as_many_as_the_budget_takes(budget: int) -> None:
    batches = list(plan_of([5, 5, 3, 1]).batches(4, budget))
    assert torch.cat([turn for turn, _ in batches]).tolist() == [0, 1, 2, 3]
    for turn, extent in batches:
        assert len(turn) == 1 or len(turn) * 4 * extent * (2 + 4) <= budget
    assert batches[0][1] == 5


def test_a_tile_reads_keys_from_its_first_and_no_key_past_the_last() -> None:
    keys = plan_of([3, 3]).keys(torch.tensor([0, 1]), 3, 6)
    assert keys.tolist() == [[0, 1, 2], [4, 5, 5]]


def test_keys_that_a_row_does_not_see_are_hidden() -> None:
    seen = torch.tensor([[1, 3], [2, 0]])
    hidden = plan_of([3, 3], seen).hidden(torch.tensor([1, 0]), 3)
    assert hidden is not None
    assert hidden.logical_not().sum(-1).tolist() == [[2, 0], [1, 3]]
    assert plan_of([3, 3]).hidden(torch.tensor([0]), 3) is None
