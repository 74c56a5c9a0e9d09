"""Routes sorted by block: histogram, scan and scatter, against a stable sort."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from moonfx.kernels.gpu import counting_sort as gpu_sort
from moonfx.kernels.gpu.block_index import BUDGET, build
from tests.support.route_tables import NAMES, TABLES, check_index

# Programs at most, and how many are few.
WALKS = {"wide steps": (2, 3000), "narrow steps": (2, 0), "a step each": (4096, 0)}


@pytest.fixture(params=WALKS)
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, few = WALKS[request.param]
    monkeypatch.setattr(gpu_sort, "PROGRAMS", programs)
    monkeypatch.setattr(gpu_sort, "FEW", few)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("name", "routes", "n"), TABLES, ids=NAMES)
def test_entries_are_a_stable_sort_by_block(name: str, routes: Tensor, n: int) -> None:
    check_index(routes, n)


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
