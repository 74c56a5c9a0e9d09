"""Which rows chose each block: the routes sorted by block, and cut into tiles.

    route    (row, column) of a table of chosen blocks; its id is row * K + column
    entries  the ids of a (batch, kv head)'s routes by block, rising within a block
    pass     what is worked on at a time: some (batch, kv head)s, some chunks of rows
    tile     at most block_m entries of one block in a pass

A counting sort: with routes cut into chunks, each the work of one program,

    count[bh, j, c] = routes to block j in chunk c
    starts          = exclusive sum of count, over (bh, j, c)
    entries[starts[bh, j, c] + seen before in the chunk] = id

One body makes both walks over the routes; `seen` is a counter per block and program in memory, and
a route's rank among those of its step comes from comparing all pairs of them. Nothing is atomic,
nothing depends on timing, and no host waits.

Shape letters: B batch, Hkv kv heads, bh counts both; R rows of a kv head, K columns, n blocks,
C chunks, T tiles.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Routes that a program compares with each other in a step, of one warp: a bit of a word for each.
STEP = 32
# 32 warps on each of 132 processors: a step is short, and waits for what it loads.
PROGRAMS = 4096
# A pass is whole chunks: these are few enough for any budget over 2 KB * 2**17 = 256 MiB.
CHUNK_ROUTES = 1 << 17
# Partial results of a pass, in bytes.
BUDGET = 256 << 20


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
    batch, kv_heads, rows, columns = routes.shape
    routes, bhs = routes.contiguous(), batch * kv_heads
    chunks, chunk_rows = cut(bhs, rows, columns, n)
    entries = torch.empty(routes.numel(), dtype=torch.int32, device=routes.device)
    starts = torch.zeros(bhs * n * chunks + 1, dtype=torch.int64, device=routes.device)
    index = Index(routes, entries, starts, n, chunks, chunk_rows)
    if routes.numel() and n:
        seen = torch.zeros(bhs, chunks, n, dtype=torch.int32, device=routes.device)
        walk(index, seen, scatter=False)
        torch.cumsum(seen.transpose(1, 2).reshape(-1), 0, dtype=torch.int64, out=starts[1:])
        walk(index, seen.zero_(), scatter=True)
    return index


def cut(bhs: int, rows: int, columns: int, n: int) -> tuple[int, int]:
    """Chunks and their rows: PROGRAMS in all, fewer if counts would outnumber half of the routes.

    But no more routes in a chunk than CHUNK_ROUTES, so that counts are at most max(2**20, half of
    the routes, n / 2**17 of the routes, one chunk's): 12 bytes each, beside 8 for a route.
    """
    counts = max(1 << 20, bhs * rows * columns // 2)
    chunks = min(-(-PROGRAMS // max(bhs, 1)), counts // max(bhs * n, 1))
    chunk_rows = -(-rows // max(chunks, 1))
    # A step or more, but for the last.
    columns = max(columns, 1)
    chunk_rows = max(min(chunk_rows, CHUNK_ROUTES // columns), -(-STEP // columns))
    return max(-(-rows // chunk_rows), 1), chunk_rows


def walk(index: Index, seen: Tensor, *, scatter: bool) -> None:
    """Counts every route in `seen` [bh, C, n], which is zero; `scatter` writes the entries too."""
    rows, columns = index.routes.shape[2:]
    sort_routes[(seen.shape[0] * index.chunks,)](
        *(index.routes, seen, index.starts, index.entries),
        *(rows * columns, index.chunk_rows * columns, index.n, index.chunks),
        SCATTER=scatter,
        num_warps=1,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["routes_of_bh", "routes_of_chunk", "n", "chunks"])
def sort_routes(
    routes,
    seen,
    starts,
    entries,
    routes_of_bh,
    routes_of_chunk,
    n,
    chunks,
    SCATTER: tl.constexpr,
):
    """One chunk of one (batch, kv head), in steps.

    A step reads its counters before it writes them, and writes them before the next step reads:
    different threads do, so that a barrier stands between. A block's counter is written once in a
    step, by the last of its routes.
    """
    program = tl.program_id(0).to(tl.int64)
    bh = program // chunks
    chunk = program % chunks
    routes += bh * routes_of_bh
    seen += program * n
    starts += bh * n * chunks + chunk

    lane = tl.arange(0, 32)
    bit = tl.full([32], 1, tl.uint32) << lane
    begin = chunk.to(tl.int32) * routes_of_chunk
    end = tl.minimum(begin + routes_of_chunk, routes_of_bh)
    block = tl.load(routes + begin + lane, mask=begin + lane < end, other=-1)
    for step in range(begin, end, 32):
        route = step + lane
        upcoming = tl.load(routes + route + 32, mask=route + 32 < end, other=-1)
        there = block >= 0
        # Bit j of `alike`: the j-th route of the step is to the same block. Summed over the first
        # axis, a thread's elements are those of one route: the sum crosses no lanes.
        alike = tl.sum(tl.where(block[:, None] == block[None, :], bit[:, None], 0), 0)
        count = tl.load(seen + block, mask=there, other=0) + bits(alike & (bit - 1))
        tl.debug_barrier()
        tl.store(seen + block, count + 1, mask=there & (alike >> lane == 1))
        if SCATTER:
            start = tl.load(starts + block.to(tl.int64) * chunks, mask=there, other=0)
            tl.store(entries + start + count, route, mask=there)
        tl.debug_barrier()
        block = upcoming


@triton.jit
def bits(word):
    """How many bits of uint32 words are set, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


def passes(index: Index, bytes_per_route: int, budget: int = BUDGET) -> Iterator[Pass]:
    """All routes in passes whose results take at most `budget` bytes, or one chunk each.

    As few passes as that allows, of about the same size, in the order of (bh, chunk).
    """
    batch, kv_heads, rows, columns = index.routes.shape
    if index.routes.numel() == 0:
        return
    heads = budget // (rows * columns * bytes_per_route)
    chunks = budget // (index.chunk_rows * columns * bytes_per_route)
    for bh0, bh1 in even(batch * kv_heads, max(heads, 1)):
        for chunk0, chunk1 in even(index.chunks, index.chunks if heads else max(chunks, 1)):
            yield Pass(bh0, bh1, chunk0, chunk1)


def even(total: int, most: int) -> Iterator[tuple[int, int]]:
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
    columns, n = index.routes.shape[3], index.n
    bhs = pass_.bh1 - pass_.bh0
    bound = rows_of(index, pass_)[1] * columns * bhs // block_m + bhs * n
    of_blocks = slice(pass_.bh0 * n, pass_.bh1 * n)
    first = index.starts[:-1].view(-1, index.chunks)[of_blocks, pass_.chunk0]
    end = index.starts[1:].view(-1, index.chunks)[of_blocks, pass_.chunk1 - 1]
    count = (end - first + block_m - 1) // block_m
    total = count.cumsum(0)

    tile = torch.arange(bound, device=total.device)
    block = torch.searchsorted(total, tile, right=True)
    unused = block == len(total)
    block.clamp_(max=len(total) - 1)
    first = first[block] + (tile - total[block] + count[block]) * block_m
    size = (end[block] - first).clamp(max=block_m).masked_fill(unused, 0)
    number = (block + pass_.bh0 * n).masked_fill(unused, -1)
    return Tiles(number.int(), first, size.int())
