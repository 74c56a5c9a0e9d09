"""Which rows chose each block: the routes sorted by block, and cut into passes and tiles.

    route    (row, column) of a table of chosen blocks; its id is row * K + column
    entries  the ids of a (batch, kv head)'s routes by block, rising within a block
    pass     what is worked on at a time: some (batch, kv head)s, some chunks of rows
    tile     at most block_m entries of one block in a pass

Nothing is atomic, nothing depends on timing, and no host waits: sizes follow from shapes.

Shape letters: B batch, Hkv kv heads, bh counts both; R rows of a kv head, K columns, n blocks,
C chunks, T tiles.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu import counting_sort

BUDGET = 256 << 20  # bytes of a pass's partial results
SIZE = 256  # blocks, or tiles, of a program


class Index(NamedTuple):
    """Routes by block.

    Args:
        routes: int32 [B, Hkv, R, K], contiguous: block numbers, -1 for none.
        entries: int32 [B * Hkv * R * K], of which the last are not used if there are -1.
        starts: int64 [B * Hkv * n * C + 1], the first entry of each (bh, block, chunk); those of a
            block in a range of chunks are adjacent.
        n: block numbers. chunks: C. chunk_rows: the rows of a chunk; the last may have fewer.
    """

    routes: Tensor
    entries: Tensor
    starts: Tensor
    n: int
    chunks: int
    chunk_rows: int


class Pass(NamedTuple):
    """(batch, kv head)s bh0 .. bh1 - 1, and of each the chunks chunk0 .. chunk1 - 1."""

    bh0: int
    bh1: int
    chunk0: int
    chunk1: int


class Tiles(NamedTuple):
    """Runs of entries of one block.

    Args:
        block: int32 [T], bh * n + j; -1 for a tile that is not used, which come last.
        first: int64 [T], its first entry. size: int32 [T], its entries, 0 if not used.
    """

    block: Tensor
    first: Tensor
    size: Tensor


def build(routes: Tensor, n: int) -> Index:
    """The index of int32 [B, Hkv, R, K] block numbers 0 .. n - 1, or -1 for none."""
    routes = routes.contiguous()
    entries, starts, chunks, chunk_rows = counting_sort.sort(routes, n)
    return Index(routes, entries, starts, n, chunks, chunk_rows)


def passes(index: Index, bytes_per_route: int, budget: int | None = None) -> Iterator[Pass]:
    """All routes in passes whose results take at most `budget` (BUDGET) bytes, or one chunk each.

    As few passes as that allows, of about the same size, in the order of (bh, chunk).
    """
    batch, kv_heads, rows, columns = index.routes.shape
    if index.routes.numel() == 0:
        return
    budget = BUDGET if budget is None else budget
    heads = budget // (rows * columns * bytes_per_route)
    chunks = budget // (index.chunk_rows * columns * bytes_per_route)
    for bh0, bh1 in _even(batch * kv_heads, max(heads, 1)):
        for chunk0, chunk1 in _even(index.chunks, index.chunks if heads else max(chunks, 1)):
            yield Pass(bh0, bh1, chunk0, chunk1)


def _even(total: int, most: int) -> Iterator[tuple[int, int]]:
    """0 .. total - 1 in as few ranges of at most `most` as can be, nearly equal."""
    parts = -(-total // most)
    for part in range(parts):
        yield part * total // parts, (part + 1) * total // parts


def rows_of(index: Index, pass_: Pass) -> tuple[int, int]:
    """The first row of a pass, and how many it has."""
    first = pass_.chunk0 * index.chunk_rows
    return first, min(pass_.chunk1 * index.chunk_rows, index.routes.shape[2]) - first


def tiles(index: Index, pass_: Pass, block_m: int) -> Tiles:
    """The entries of a pass, at most `block_m` in a tile; T is a bound that follows from shapes."""
    bhs, device = pass_.bh1 - pass_.bh0, index.starts.device
    blocks = bhs * index.n
    bound = rows_of(index, pass_)[1] * index.routes.shape[3] * bhs // block_m + blocks
    starts = index.starts[pass_.bh0 * index.n * index.chunks :]
    sizes = index.chunks, pass_.chunk0, pass_.chunk1, blocks, block_m

    ends = torch.empty(blocks, dtype=torch.int64, device=device)
    _count[(triton.cdiv(blocks, SIZE),)](starts, ends, *sizes, SIZE=SIZE)
    ends.cumsum_(0)
    result = Tiles(
        torch.empty(bound, dtype=torch.int32, device=device),
        torch.empty(bound, dtype=torch.int64, device=device),
        torch.empty(bound, dtype=torch.int32, device=device),
    )
    _place[(triton.cdiv(bound, SIZE),)](
        *(starts, ends, *result, *sizes),
        *(bound, pass_.bh0 * index.n, blocks.bit_length()),
        SIZE=SIZE,
    )
    return result


_VARY = ["starts", "chunks", "chunk0", "chunk1", "blocks", "block_m", "bound", "block0", "depth"]


@triton.jit
def _entries(starts, block, there, chunks, chunk0, chunk1):
    """The first entry of each block in the chunks of a pass, and the first past it."""
    starts += block.to(tl.int64) * chunks
    first = tl.load(starts + chunk0, mask=there, other=0)
    return first, tl.load(starts + chunk1, mask=there, other=0)


@triton.jit(do_not_specialize=_VARY)
def _count(starts, counts, chunks, chunk0, chunk1, blocks, block_m, SIZE: tl.constexpr):
    """How many tiles each block has."""
    block = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = block < blocks
    first, end = _entries(starts, block, there, chunks, chunk0, chunk1)
    tl.store(counts + block, tl.cdiv(end - first, block_m), mask=there)


@triton.jit(do_not_specialize=_VARY)
def _place(
    starts,
    ends,
    tile_block,
    tile_first,
    tile_size,
    chunks,
    chunk0,
    chunk1,
    blocks,
    block_m,
    bound,
    block0,
    depth,
    SIZE: tl.constexpr,
):
    """The block of each tile, by bisection of the running sum of tiles, and its entries."""
    tile = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = tl.zeros([SIZE], tl.int32)
    high = low + blocks
    for _ in range(depth):
        middle = (low + high) // 2
        open = low < high
        after = tl.load(ends + middle, mask=open, other=0) <= tile
        low = tl.where(open & after, middle + 1, low)
        high = tl.where(open & ~after, middle, high)
    used = low < blocks
    before = tl.load(ends + low - 1, mask=used & (low > 0), other=0)
    first, end = _entries(starts, low, used, chunks, chunk0, chunk1)
    first += (tile - before) * block_m
    size = tl.minimum(end - first, block_m)
    here = tile < bound
    tl.store(tile_block + tile, tl.where(used, block0 + low, -1), mask=here)
    tl.store(tile_first + tile, first, mask=here)
    tl.store(tile_size + tile, tl.where(used, size, 0).to(tl.int32), mask=here)
