"""A stable sort of routes by block: histogram, scan, scatter. Nothing atomic, no host waits.

With the routes of a (batch, kv head) cut into chunks of rows, each the work of one program,

    count[bh, j, c] = routes to block j in chunk c
    starts          = exclusive sum of count, over (bh, j, c)
    entries[starts[bh, j, c] + how many of block j came before in the chunk] = id

One body makes both walks over the routes. How many came before is a counter per block and program
in memory, to which a route adds its rank among those of its step: all pairs of these are compared,
and the bits of words say which are alike. The scan is torch's.

Shape letters: B batch, Hkv kv heads, bh counts both; R rows of a kv head, K columns, n blocks,
C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = tl.constexpr(32)  # routes of a step that a warp has
# 32 warps on each of 132 processors: a step is short, and waits for what it loads.
PROGRAMS = 4096
# Where counts allow for few programs (packed sequences have many block numbers), a step has four
# warps: four times the routes, and the comparisons for each, in about the time of one wait. Not on
# AMD's chips, whose barrier does not wait for what other waves stored; one wave sees its own.
FEW, WIDE = 1024, 4
# A pass over an index is whole chunks: these are few enough for any budget over 2 KB * 2**17.
CHUNK_ROUTES = 1 << 17


def sort(routes: Tensor, n: int) -> tuple[Tensor, Tensor, int, int]:
    """Entries, starts, C and the rows of a chunk, as in block_index.Index.

    Args:
        routes: int32 [B, Hkv, R, K], contiguous: block numbers 0 .. n - 1, or -1 for none.
    """
    batch, kv_heads, rows, columns = routes.shape
    if rows * columns >= 2**31:
        raise ValueError(
            f"a key head's query rows x topk must be below 2**31, got {rows} x {columns}: pass the "
            "query heads of a group in several calls"
        )
    bhs, device = batch * kv_heads, routes.device
    chunks, chunk_rows = cut(bhs, rows, columns, n)
    entries = torch.empty(routes.numel(), dtype=torch.int32, device=device)
    starts = torch.zeros(bhs * n * chunks + 1, dtype=torch.int64, device=device)
    if routes.numel() == 0 or n == 0:
        return entries, starts, chunks, chunk_rows
    seen = torch.zeros(bhs, chunks, n, dtype=torch.int32, device=device)
    sizes = rows * columns, chunk_rows * columns, n, chunks
    wide = bhs * chunks < FEW and chunk_rows * columns > WIDE * WORD.value
    words = WIDE if wide and torch.version.hip is None else 1
    for scatter in (False, True):
        _walk[(bhs * chunks,)](
            *(routes, seen, starts, entries, *sizes),
            WORDS=words,
            SCATTER=scatter,
            num_warps=words,
            num_stages=1,
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
    # A word or more, but for the last.
    columns = max(columns, 1)
    chunk_rows = max(min(chunk_rows, CHUNK_ROUTES // columns), -(-WORD.value // columns))
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
    WORDS: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Adds the routes of one chunk to its counters [n], which are zero; SCATTER: and writes them.

    A step reads its counters before it writes them, and writes them before the next step reads:
    different threads do, so that a barrier stands between. A block's counter is written once in a
    step, by the last of its routes.
    """
    STEP: tl.constexpr = WORDS * WORD
    program = tl.program_id(0).to(tl.int64)
    bh = program // chunks
    chunk = program % chunks
    routes += bh * routes_of_bh
    seen += program * n
    starts += bh * n * chunks + chunk

    lane = tl.arange(0, STEP)
    bit = tl.full([WORD], 1, tl.uint32) << tl.arange(0, WORD)
    # Which routes of the step come before each: [WORDS, STEP].
    ahead = lane[None, :] - tl.arange(0, WORDS)[:, None] * WORD
    before = (tl.full([WORDS, STEP], 1, tl.uint32) << tl.minimum(tl.maximum(ahead, 0), 31)) - 1
    before = tl.where(ahead < WORD, before, 0xFFFFFFFF)

    begin = chunk.to(tl.int32) * routes_of_chunk
    end = tl.minimum(begin + routes_of_chunk, routes_of_bh)
    block = tl.load(routes + begin + lane, mask=begin + lane < end, other=-1)
    for step in range(begin, end, STEP):
        route = step + lane
        upcoming = tl.load(routes + route + STEP, mask=route + STEP < end, other=-1)
        there = block >= 0
        # Bit j of word w: route 32 w + j of the step is to the same block. Those summed are all of
        # one thread, so that the sum crosses no lanes.
        others = tl.reshape(block, [WORDS, WORD])[:, :, None]
        alike = tl.sum(tl.where(others == block[None, None, :], bit[None, :, None], 0), 1)
        rank = tl.sum(_bits(alike & before), 0)
        last = rank + 1 == tl.sum(_bits(alike), 0)
        count = tl.load(seen + block, mask=there, other=0) + rank
        tl.debug_barrier()
        tl.store(seen + block, count + 1, mask=there & last)
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
