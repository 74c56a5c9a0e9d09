"""The index of routes by block against a stable sort, and its tiles against its entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from moonfx.kernels.gpu import counting_sort as gpu_sort
from moonfx.kernels.gpu.block_index import BUDGET, build, passes, rows_of, tiles
from tests.support.no_waits import NoWaits

Shape = tuple[int, int, int, int]


def drawn(shape: Shape, n: int, absent: float = 0.2, seed: int = 0) -> Tensor:
    """A table of routes, of which some are absent; a row may choose a block more than once."""
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randint(0, n, shape, generator=generator, dtype=torch.int32)
    return routes.masked_fill(torch.rand(shape, generator=generator) < absent, -1)


def popular(shape: Shape, n: int) -> Tensor:
    """Column 0 rises slowly, as own blocks do; every row chooses block 0, and the last one."""
    rows = torch.arange(shape[2]) * n // shape[2]
    routes = torch.stack([rows, torch.zeros_like(rows), torch.full_like(rows, n - 1)], -1)
    return routes.int().expand(shape)


TABLES = [
    ("one row", drawn((1, 1, 1, 3), 4), 4),
    ("one block", drawn((2, 1, 40, 1), 1), 1),
    ("fewer routes than a step", drawn((1, 2, 9, 3), 5), 5),
    ("a step", drawn((1, 1, 32, 2), 5, absent=0.0), 5),
    ("a step and one more row", drawn((1, 1, 33, 2), 5, absent=0.0), 5),
    ("many steps", drawn((1, 2, 200, 3), 7), 7),
    ("more blocks than routes", drawn((2, 1, 20, 2), 1000), 1000),
    ("more columns than a step", drawn((1, 1, 3, 100), 100), 100),
    ("nothing chosen", drawn((1, 2, 50, 2), 6, absent=1.0), 6),
    ("popular blocks", popular((1, 2, 100, 3), 9), 9),
    ("one block for all", torch.zeros(1, 1, 70, 3, dtype=torch.int32), 2),
    ("no row", torch.zeros(2, 2, 0, 3, dtype=torch.int32), 4),
    ("no batch", torch.zeros(0, 2, 5, 3, dtype=torch.int32), 4),
]
NAMES = [name for name, *_ in TABLES]


# Programs at most, and how many are few.
WALKS = {"wide steps": (2, 3000), "narrow steps": (2, 0), "a step each": (4096, 0)}


@pytest.fixture(params=WALKS)
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, few = WALKS[request.param]
    monkeypatch.setattr(gpu_sort, "PROGRAMS", programs)
    monkeypatch.setattr(gpu_sort, "FEW", few)


def check_index(routes: Tensor, n: int) -> None:
    with NoWaits():
        index = build(routes, n)
    bhs, rows, columns = routes.shape[0] * routes.shape[1], *routes.shape[2:]
    assert (index.chunks - 1) * index.chunk_rows < max(rows, 1) <= index.chunks * index.chunk_rows

    route = torch.arange(rows * columns).repeat(bhs)
    bh = torch.arange(bhs).repeat_interleave(rows * columns)
    block, there = routes.flatten().long(), routes.flatten() >= 0
    key = ((bh * n + block) * index.chunks + route // (index.chunk_rows * columns))[there]
    order = key.sort(stable=True).indices
    assert index.entries[: len(key)].tolist() == route[there][order].tolist()
    counts = key.bincount(minlength=bhs * n * index.chunks)
    assert index.starts.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("name", "routes", "n"), TABLES, ids=NAMES)
def test_entries_are_a_stable_sort_by_block(name: str, routes: Tensor, n: int) -> None:
    check_index(routes, n)


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


SHAPES = [
    # name, bhs, rows, columns, n
    ("64K tokens, 128/8", 32, 1 << 16, 8, 512),
    ("512K tokens, 128/8", 32, 1 << 19, 8, 4096),
    ("1M tokens, 4096/12, a group of 4", 8, 1 << 22, 12, 256),
    ("1M tokens, 128/8, one head", 1, 1 << 20, 8, 8192),
    ("64K packed tokens", 32, 1 << 16, 8, 1 << 16),
    ("2K tokens", 32, 1 << 11, 8, 16),
]


@pytest.mark.parametrize(
    ("name", "bhs", "rows", "columns", "n"), SHAPES, ids=[x[0] for x in SHAPES]
)
def test_counts_stay_small_and_a_chunk_fits_the_budget(
    name: str, bhs: int, rows: int, columns: int, n: int
) -> None:
    chunks, chunk_rows = gpu_sort.cut(bhs, rows, columns, n)
    assert (chunks - 1) * chunk_rows < rows <= chunks * chunk_rows
    assert bhs * chunks >= 128
    assert bhs * n * chunks <= bhs * rows * columns // 2
    assert chunk_rows * columns * 2048 <= BUDGET


def test_more_routes_than_32_bits_number_are_refused() -> None:
    with pytest.raises(ValueError, match="below 2"):
        build(torch.empty(1, 1, 1 << 25, 64, dtype=torch.int32, device="meta"), 256)
