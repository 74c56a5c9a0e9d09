"""Tables of routes, and their index beside a stable sort by block."""

import torch
from torch import Tensor

from moonfx.kernels.gpu.block_index import build
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
