"""The index of routes by block against a stable sort, and its tiles against its entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from moonfx.kernels.gpu.block_index import build, passes, rows_of, tiles
from tests.support.no_waits import NoWaits
from tests.support.route_tables import NAMES, TABLES, check_index, drawn


def check_tiles(routes: Tensor, n: int, block_m: int, bytes_per_route: int, budget: int) -> int:
    """Returns how many passes there were."""
    index = build(routes, n)
    columns = routes.shape[3]
    found: list[tuple[int, int]] = []  # entry, bh * n + block
    work = list(passes(index, bytes_per_route, budget))
    for pass_ in work:
        first_row, rows = rows_of(index, pass_)
        bhs, chunks = pass_.bh1 - pass_.bh0, pass_.chunk1 - pass_.chunk0
        assert bhs > 0
        assert rows > 0
        assert bhs * rows * columns * bytes_per_route <= budget or (bhs, chunks) == (1, 1)
        with NoWaits():
            made = tiles(index, pass_, block_m)
        assert len(made.block) == bhs * rows * columns // block_m + bhs * n
        for block, first, size in zip(*(x.tolist() for x in made), strict=True):
            if block < 0:
                assert size == 0
                continue
            assert 0 < size <= block_m
            assert pass_.bh0 <= block // n < pass_.bh1
            row = index.entries[first : first + size] // columns
            assert int(row.min()) >= first_row
            assert int(row.max()) < first_row + rows
            found += [(entry, block) for entry in range(first, first + size)]
        used = (made.block >= 0).long()
        assert (used.diff() <= 0).all()
    owner = torch.arange(n * routes.shape[0] * routes.shape[1]).repeat_interleave(
        index.starts.diff().view(-1, index.chunks).sum(1)
    )
    assert sorted(found) == list(enumerate(owner.tolist()))
    return len(work)


BUDGETS = [
    ("everything at once", 10**9, 1),
    ("two heads at a time", 100 * 3 * 50 * 2, 2),
    ("three heads would fit: two passes of two", 100 * 3 * 50 * 3, 2),
    ("a head at a time", 100 * 3 * 50, 4),
    ("half of a head, in whole chunks of 11 rows", 5 * 11 * 3 * 50, 4 * 2),
    ("less than a chunk", 1, 4 * 10),
]


@pytest.mark.parametrize(("name", "budget", "count"), BUDGETS, ids=[name for name, *_ in BUDGETS])
def test_passes_hold_every_route_once_within_the_budget(name: str, budget: int, count: int) -> None:
    routes = drawn((2, 2, 100, 3), 7)
    assert check_tiles(routes, 7, 16, 50, budget) == count


@pytest.mark.parametrize(("name", "routes", "n"), TABLES, ids=NAMES)
@pytest.mark.parametrize("block_m", [1, 16])
def test_a_tile_is_of_one_block(name: str, routes: Tensor, n: int, block_m: int) -> None:
    check_tiles(routes, n, block_m, 100, 5000)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, int]:
    n = draw(st.integers(1, 40))
    sizes = (2, 3, 70, 5)
    shape = tuple(draw(st.integers(1, size)) for size in sizes)
    absent = draw(st.sampled_from([0.0, 0.1, 0.9]))
    return drawn(shape, n, absent, draw(st.integers(0, 1000))), n  # type: ignore[arg-type]


@settings(max_examples=15)
@given(tables(), st.sampled_from([1, 3, 32]), st.sampled_from([1, 3000, 10**9]))
def test_any_table_is_sorted_and_cut(table: tuple[Tensor, int], block_m: int, budget: int) -> None:
    check_index(*table)
    check_tiles(*table, block_m, 50, budget)
