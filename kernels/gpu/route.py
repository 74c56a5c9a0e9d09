"""Which blocks each row attends: scores and the best of them, in one kernel.

    eq. 6   s_j = q . mean_j + bias_j / scale       j over the candidates, scaled nowhere else
    eq. 5   the own block, the sinks, and the best others, topk in all; ties to the lower block

A program has ROWS rows of a kv head, all heads of a group among them, and goes over the candidates
BLOCKS at a time: a product, and what comes of it into a table in registers (route_table.py).
Nothing as large as rows x blocks is ever in memory.

64 rows by 64 blocks is one warp group's product and leaves room for a second program on a
multiprocessor: one multiplies while the other picks. Programs with the most blocks start first.
Where few are picked of many, most is picked in each column of the tiles (route_by_column.py).

Few rows (a decode step) would leave a chip idle: then the candidates are split over programs, and
a second kernel puts their tables into one. All of it follows from shapes.

Shape letters as in problem.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import configs, route_by_column, route_by_sort
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.route_by_column import keep, keys, no_keys, settle
from moonfx.kernels.gpu.route_scores import query_parts, tile_scores
from moonfx.kernels.gpu.route_table import BEYOND, empty, fixed_blocks, put, write
from moonfx.kernels.gpu.tile import inner_contiguous, padded

MOST = 64  # blocks of a row that a table in registers is for
WIDEST = 64  # columns that are written at a time
PROGRAMS = 264  # two for each multiprocessor of a large chip
LEAST = 2  # tiles of blocks that are worth a program of their own
MERGED = 64  # partial results that are put into a table at a time
REUSE = 8  # programs that have to read a mean before it pays to split it beforehand

IN_REGISTERS = (
    256  # numbers of a row, in all its parts, that stay in registers while the blocks go by
)
SHARED = "sm_90", 512  # where a product reads them from shared memory: twice as many
CHUNK = 64  # of a row's numbers at a time where that is not enough
TABLES = 2048  # places of a program's tables: as many as registers take

QUERY_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def gated(layout: Layout) -> int:
    """How many of a row's blocks are chosen by score, at most; without any, no mean is read."""
    fixed = 1 + layout.sinks if layout.causal else max(1, layout.sinks)
    return layout.topk - fixed


def route(
    query: Tensor, means: Tensor | None, bias_means: Tensor | None, layout: Layout, scale: float
) -> Tensor:
    """The blocks of each row, by number: own, sinks, chosen ones in ascending order, -1 for none.

    Args:
        query: [B, Hq, Nq, D]. means: float32 [B, Hkv, m, D], m no less than any candidate's number;
            None will do where nothing is `gated`. bias_means: float32 [B, Hq, n].
        scale: of the softmax, which the biases are to be divided by.
    Returns:
        int32 [B, Hkv, Nq * G, K]; a row that sees nothing has -1 throughout.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, rows = heads // layout.group, queries * layout.group
    if bias_means is not None:
        bias_means = bias_means / scale
    slots = gated(layout)
    assert slots == 0 or means is not None, "blocks are to be chosen, so their means are needed"
    if slots > MOST:
        assert means is not None
        return route_by_sort.route(query, means, bias_means, layout)
    routes = query.new_empty(batch, kv_heads, rows, layout.topk, dtype=torch.int32)
    if routes.numel() == 0:
        return routes

    config = configs.choose(
        *("route", dim, query.dtype, layout.block, query.device), extras=bias_means is not None
    )
    table = triton.next_power_of_2(slots) if slots > 0 else 0
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)), TABLES // max(table, 1))
    tiles = triton.cdiv(rows, block_m)
    programs = tiles * batch * kv_heads
    splits = 1
    if slots > 0:
        most = triton.cdiv(layout.n, LEAST * config.block_n)
        splits = max(1, min(most, triton.cdiv(PROGRAMS, programs)))
    share = triton.cdiv(triton.cdiv(layout.n, splits), config.block_n) * config.block_n
    # Bits of a number that tells a program's tiles of blocks apart.
    steps = (1 << triton.cdiv(layout.n, config.block_n).bit_length()) - 1
    by_column = splits == 1 and route_by_column.suits(table, steps, query.device)
    room = SHARED[1] if configs.architecture(query.device) == SHARED[0] else IN_REGISTERS
    parts = QUERY_PARTS[query.dtype]
    split = tiles < REUSE

    query = inner_contiguous(query)
    if means is None or slots == 0:
        means = query
    else:
        means = inner_contiguous(means) if split else gpu_means.parts(means)
    part = (batch, kv_heads, rows, splits, table)
    scores = query.new_empty(part if splits > 1 else (1,), dtype=torch.float32)
    blocks = query.new_empty(part if splits > 1 else (1,), dtype=torch.int32)
    of = layout.queries
    index = of.own if of.index is None else of.index
    places = (of.own, of.first, of.end, index)
    place_rows = tuple(x.stride(0) for x in places)
    counts = (kv_heads, layout.group, rows, layout.topk, layout.sinks, slots, tiles, splits)
    columns = min(WIDEST, triton.next_power_of_2(layout.topk))
    configs.launch(
        route_kernel,
        (programs * splits,),
        config,
        query,
        means,
        means if bias_means is None else bias_means,
        routes,
        scores,
        blocks,
        *places,
        *query.stride()[:3],
        means.stride(0) if means.dim() == 5 else 0,
        *means.stride()[-4:-1],
        *((0, 0) if bias_means is None else bias_means.stride()[:2]),
        *place_rows,
        *counts,
        share,
        steps,
        ROWS=block_m,
        BLOCKS=config.block_n,
        TABLE=table,
        COLUMNS=columns,
        D=dim,
        PADDED=padded(dim),
        CHUNK=padded(dim) if padded(dim) * parts <= room else CHUNK,
        PARTS=parts,
        SPLIT=split,
        BIAS=bias_means is not None,
        SORTED=of.index is not None,
        CAUSAL=layout.causal,
        PARTIAL=splits > 1,
        BY_COLUMN=by_column,
    )
    if splits > 1:
        merge_kernel[(programs,)](
            *(scores, blocks, routes, *places[:3], *place_rows[:3], *counts),
            ROWS=block_m,
            TABLE=table,
            COLUMNS=columns,
            WIDTH=max(MERGED, table),
            num_warps=4,
        )
    return routes


COUNTS = [
    *STRIDES,
    "kv_heads",
    "rows",
    "topk",
    "sinks",
    "slots",
    "tiles",
    "splits",
    "share",
    "steps",
]


@triton.jit(do_not_specialize=COUNTS)
def route_kernel(
    query,
    means,
    bias,
    routes,
    part_scores,
    part_blocks,
    own,
    first,
    end,
    index,
    query_row,
    query_head,
    query_token,
    means_part,
    means_row,
    means_head,
    means_block,
    bias_row,
    bias_head,
    own_row,
    first_row,
    end_row,
    index_row,
    kv_heads,
    group,
    rows,
    topk,
    sinks,
    slots,
    tiles,
    splits,
    share,
    steps,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TABLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    SORTED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PARTIAL: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """The routes of ROWS rows; or, PARTIAL, their tables from one share of the blocks."""
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) - tile * splits
    head = (tile // tiles).to(tl.int64)
    tile = tiles - 1 - tile % tiles
    batch = head // kv_heads
    kv_head = head - batch * kv_heads

    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place = row // group
    member = row - place * group
    my_own = tl.load(own + batch * own_row + place, mask=valid, other=-1)
    my_first = tl.load(first + batch * first_row + place, mask=valid, other=0)
    my_end = tl.load(end + batch * end_row + place, mask=valid, other=0)
    routes += head * rows * topk

    if TABLE == 0:
        write(routes, row, rows, my_own, my_first, my_end, my_own,
              topk, sinks, slots, TABLE, COLUMNS)  # fmt: skip
    else:
        token = place
        if SORTED:
            token = tl.load(index + batch * index_row + place, mask=valid, other=0)
        head_of = kv_head * group + member
        query += batch * query_row
        offset = head_of * query_head + token.to(tl.int64) * query_token
        q, q_mid, q_lo = query_parts(query, offset, valid, 0, D, CHUNK, PARTS)
        low = tl.where(my_own >= 0, my_first + sinks, BEYOND)
        high = tl.where(my_own >= 0, my_end, 0)
        begin, stop = tl.min(low, 0), tl.max(high, 0)
        # Within these, every row may choose every block but its own.
        all_from = tl.max(tl.where(valid, low, 0), 0)
        all_to = tl.min(tl.where(valid, high, BEYOND), 0)
        own_from, own_to = tl.min(tl.where(valid, my_own, BEYOND), 0), tl.max(my_own, 0)
        if PARTIAL:
            begin = tl.maximum(begin, split * share)
            stop = tl.minimum(stop, split * share + share)
            high = tl.minimum(high, stop)
            all_to = tl.minimum(all_to, stop)

        fixed, _ = fixed_blocks(my_own, my_first, my_end, sinks)
        free = tl.where(valid, tl.minimum(topk - fixed, slots), 0)
        means += batch * means_row + kv_head * means_head
        bias += batch * bias_row
        queries = q, q_mid, q_lo, query, offset, valid, head_of
        candidates = low, high, my_own, all_from, all_to, own_from, own_to
        scores, blocks, worst = empty(free, TABLE, tl.float32)
        unsure = 1
        if BY_COLUMN:
            best = no_keys(ROWS, BLOCKS)
            for start in range(begin, stop, BLOCKS):
                score = tile_scores(
                    start, stop, queries, candidates, means, means_part, means_block, bias,
                    bias_head, BLOCKS, D, PADDED, CHUNK, PARTS, SPLIT, BIAS, CAUSAL)  # fmt: skip
                best = keep(best, keys(score, (start - begin) // BLOCKS, steps))
            blocks, unsure = settle(best, free, begin, steps, TABLE, BLOCKS)
        if unsure > 0:
            # Nothing of this loop can be prepared, and kept, while those keys fill the registers.
            begin += unsure - 1
            scores, blocks, worst = empty(free, TABLE, tl.float32)
            for start in range(begin, stop, BLOCKS):
                score = tile_scores(
                    start, stop, queries, candidates, means, means_part, means_block, bias,
                    bias_head, BLOCKS, D, PADDED, CHUNK, PARTS, SPLIT, BIAS, CAUSAL)  # fmt: skip
                block = start + tl.arange(0, BLOCKS)
                scores, blocks, worst = put(scores, blocks, worst, score, block[None, :])

        if PARTIAL:
            place = tl.arange(0, TABLE)[None, :]
            out = ((head * rows + row)[:, None] * splits + split) * TABLE + place
            scores = tl.where(blocks < 0, -float("inf"), scores)
            tl.store(part_scores + out, scores, mask=valid[:, None])
            tl.store(part_blocks + out, blocks, mask=valid[:, None])
        else:
            write(routes, row, rows, my_own, my_first, my_end, blocks,
                  topk, sinks, slots, TABLE, COLUMNS)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS[:-2])
def merge_kernel(
    part_scores,
    part_blocks,
    routes,
    own,
    first,
    end,
    own_row,
    first_row,
    end_row,
    kv_heads,
    group,
    rows,
    topk,
    sinks,
    slots,
    tiles,
    splits,
    ROWS: tl.constexpr,
    TABLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The routes of ROWS rows from their partial tables, whose shares of the blocks ascend."""
    tile = tl.program_id(0)
    head = (tile // tiles).to(tl.int64)
    batch = head // kv_heads
    row = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place = row // group
    my_own = tl.load(own + batch * own_row + place, mask=valid, other=-1)
    my_first = tl.load(first + batch * first_row + place, mask=valid, other=0)
    my_end = tl.load(end + batch * end_row + place, mask=valid, other=0)

    fixed, _ = fixed_blocks(my_own, my_first, my_end, sinks)
    free = tl.where(valid, tl.minimum(topk - fixed, slots), 0)
    scores, blocks, worst = empty(free, TABLE, tl.float32)
    count = splits * TABLE
    base = (head * rows + row)[:, None] * count
    for start in range(0, count, WIDTH):
        part = start + tl.arange(0, WIDTH)[None, :]
        mask = valid[:, None] & (part < count)
        score = tl.load(part_scores + base + part, mask=mask, other=-float("inf"))
        block = tl.load(part_blocks + base + part, mask=mask, other=-1)
        scores, blocks, worst = put(scores, blocks, worst, score, block)
    write(routes + head * rows * topk, row, rows, my_own, my_first, my_end, blocks,
          topk, sinks, slots, TABLE, COLUMNS)  # fmt: skip
