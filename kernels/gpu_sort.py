"""A stable sort of routes by block: histogram, scan, scatter. Nothing atomic, no host waits.

With the routes of a (batch, kv head) cut into chunks of rows, each the work of one program,

    count[bh, j, c] = routes to block j in chunk c
    starts          = exclusive sum of count, over (bh, j, c)
    entries[starts[bh, j, c] + how many of block j came before in the chunk] = id

One body makes both walks over the routes. How many came before is a counter per block and program
in memory, to which a route adds its rank among the 32 of its step: a warp compares all pairs, and
the bits of a word say which are alike. The scan is torch's.

Shape letters: B batch, Hkv kv heads, bh counts both; R rows of a kv head, K columns, n blocks,
C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = tl.constexpr(32)  # routes of a step: the bits of a word, the lanes of a warp
# 32 warps on each of 132 processors: a step is short, and waits for what it loads.
PROGRAMS = 4096
# A pass over an index is whole chunks: these are few enough for any budget over 2 KB * 2**17.
CHUNK_ROUTES = 1 << 17


def sort(routes: Tensor, n: int) -> tuple[Tensor, Tensor, int, int]:
    """Entries, starts, C and the rows of a chunk, as in gpu_index.Index.

    Args:
        routes: int32 [B, Hkv, R, K], contiguous: block numbers 0 .. n - 1, or -1 for none.
    """
    batch, kv_heads, rows, columns = routes.shape
    bhs, device = batch * kv_heads, routes.device
    chunks, chunk_rows = cut(bhs, rows, columns, n)
    entries = torch.empty(routes.numel(), dtype=torch.int32, device=device)
    starts = torch.zeros(bhs * n * chunks + 1, dtype=torch.int64, device=device)
    if routes.numel() == 0 or n == 0:
        return entries, starts, chunks, chunk_rows
    seen = torch.zeros(bhs, chunks, n, dtype=torch.int32, device=device)
    sizes = rows * columns, chunk_rows * columns, n, chunks
    for scatter in (False, True):
        _walk[(bhs * chunks,)](
            *(routes, seen, starts, entries, *sizes), SCATTER=scatter, num_warps=1, num_stages=1
        )
        if not scatter:
            counts = starts[1:]
            counts.view(bhs, n, chunks).copy_(seen.transpose(1, 2))
            counts.cumsum_(0)
            seen.zero_()
    return entries, starts, chunks, chunk_rows


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
    chunk_rows = max(min(chunk_rows, CHUNK_ROUTES // columns), -(-STEP.value // columns))
    return max(-(-rows // chunk_rows), 1), chunk_rows


@triton.jit(do_not_specialize=["routes_of_bh", "routes_of_chunk", "n", "chunks"])
def _walk(
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
    """Adds the routes of one chunk to its counters [n], which are zero; SCATTER: and writes them.

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

    lane = tl.arange(0, STEP)
    bit = tl.full([STEP], 1, tl.uint32) << lane
    begin = chunk.to(tl.int32) * routes_of_chunk
    end = tl.minimum(begin + routes_of_chunk, routes_of_bh)
    block = tl.load(routes + begin + lane, mask=begin + lane < end, other=-1)
    for step in range(begin, end, STEP):
        route = step + lane
        upcoming = tl.load(routes + route + STEP, mask=route + STEP < end, other=-1)
        there = block >= 0
        # Bit j of `alike`: the j-th route of the step is to the same block. Summed over the first
        # axis, a thread's elements are those of one route: the sum crosses no lanes.
        alike = tl.sum(tl.where(block[:, None] == block[None, :], bit[:, None], 0), 0)
        count = tl.load(seen + block, mask=there, other=0) + _bits(alike & (bit - 1))
        tl.debug_barrier()
        tl.store(seen + block, count + 1, mask=there & (alike >> lane == 1))
        if SCATTER:
            start = tl.load(starts + block.to(tl.int64) * chunks, mask=there, other=0)
            tl.store(entries + start + count, route, mask=there)
        tl.debug_barrier()
        block = upcoming


@triton.jit
def _bits(word):
    """How many bits of uint32 words are set, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
