"""MoBA for a few queries on a GPU: each chosen block is read once per kv head (decoding).

    eq. 4   rows of a kv head that chose block j attend it together: O_j, lse_j, in splits of j
    eq. 2   O = sum exp(lse_js - lse) O_js,  lse = log sum exp(lse_js)     over j and splits s

Of up to 64 rows no index is worth its launches. There is a program for each route (row, column) of
a kv head and each split of a block. The first route that names a block leads: its program attends
the block for every row that chose it, and the others end at once. It leaves a partial result for
each of those rows at the route's own place, so that nothing is added up in memory; `_combine` then
makes one softmax of a row's columns and splits, in their order.

A step's ideal is one read of what was chosen: bytes = B Hkv (distinct blocks of a kv head) x block
x (D + Dv) x itemsize. Partial results add 8 Dv bytes per row, route and split, written and read.

Splits follow from shapes alone: with one sequence, all the processors have some keys to read, as
many in flight as hide the memory's latency; with 256, a block is one program.

Shape letters: B batch, Hq = Hkv * G heads, R = Nq * G rows of a kv head, K routes of a row, M and N
rows and keys of a tile, D and V the padded head and value dims.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu import tile as gpu_tile
from moonfx.kernels.gpu.forward import advance
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    BEYOND,
    LOG2E,
    batch_and_head,
    by_row,
    load_rows,
    locate,
    logsumexp,
    offsets,
    rescale,
    store_rows,
)

MOST_ROWS = 64
MOST_ROUTES = 4096  # of a kv head, with rows and columns padded: every program reads them all
PROGRAMS = 1024  # four times what the largest chips run at a time, so that they end together
BUDGET = 256 << 20  # bytes of partial results
CHUNK, DIMS = 128, 64  # of a row's partial results, read at a time: 32 KiB hide the latency
VARY = [*STRIDES, "topk", "kv_heads", "rows", "queries", "bh0", "block", "span", "splits"]


@triton.jit(do_not_specialize=VARY)
def _attend(
    query,
    key,
    value,
    part,
    part_lse,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    routes,
    last,
    last_row,
    order,
    order_row,
    start,
    start_row,
    token,
    token_row,
    bias,
    bias_row,
    bias_head,
    scale,
    softcap,
    topk,
    kv_heads,
    rows,
    bh0,
    block,
    span,
    splits,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    SORTED: tl.constexpr,
    PACKED: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of the block of one route, for all the rows that chose it."""
    bh = bh0 + tl.program_id(0)
    route = tl.program_id(1)
    split = tl.program_id(2)
    b, head = batch_and_head(bh, kv_heads)

    # Rows that are more than a tile are tiles on their own: each has leaders of its own.
    row = route // (ROWS * topk) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * topk + column[None, :]
    routes += bh.to(tl.int64) * rows * topk
    there = (row < rows)[:, None] & (column < topk)[None, :]
    table = tl.load(routes + place, mask=there, other=-1)
    number = tl.load(routes + route)
    same = (table == number) & there
    leader = tl.min(tl.min(tl.where(same, place, BEYOND), 1), 0)
    if (number < 0) | (leader != route):
        return

    chose = tl.max(same.to(tl.int32), 1) > 0
    mine = tl.sum(tl.where(same, column[None, :], 0), 1)  # a row names a block once
    begin = number * block
    if PACKED:
        begin = tl.load(start + b * start_row + number)
    valid = row < rows
    place_of, member, asked = locate(tl.where(valid, row, 0), order + b * order_row, GROUP, SORTED)
    # Where a block is not full, its sequence ends: no row sees beyond that either.
    seen = tl.load(last + b * last_row + place_of)
    seen = tl.where(chose, tl.minimum(seen, begin + block - 1), -1)
    end = tl.minimum(tl.max(seen, 0) + 1, begin + (split + 1) * span)
    begin += split * span

    query += b * query_row + head * GROUP * query_head
    at = offsets(member, asked, query_head, query_token)
    asking = load_rows(query, at, valid, KEY_DIM, D, True)
    key += b * key_row + head * key_head
    value += b * value_row + head * value_head
    bias += b * bias_row + head * GROUP * bias_head
    token += b * token_row
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, V], tl.float32)
    gathered = False
    if PACKED:
        # Between paddings, or in a packed sequence, keys are adjacent: those need no index.
        some = begin < end
        shift = tl.load(token + begin, mask=some, other=0) - begin
        gathered = tl.load(token + end - 1, mask=some, other=0) - (end - 1) != shift
        if not gathered:
            key += shift.to(tl.int64) * key_token
            value += shift.to(tl.int64) * value_token
            bias += shift
    if gathered:
        top, total, result = advance(
            *(top, total, result, asking, seen, member, begin, end, end),
            *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
            *(KEY_DIM, VALUE_DIM, KEYS, True, True, FOLD, SOFTCAP, BIAS, PRECISION),
        )
    else:
        top, total, result = advance(
            *(top, total, result, asking, seen, member, begin, end, end),
            *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
            *(KEY_DIM, VALUE_DIM, KEYS, True, False, FOLD, SOFTCAP, BIAS, PRECISION),
        )

    nothing = total == 0.0  # the split lies beyond what the row sees
    total = tl.where(nothing, 1.0, total)
    natural = tl.where(nothing, float("-inf"), logsumexp(top, total))
    slot = (tl.program_id(0).to(tl.int64) * rows + row) * topk + mine
    slot = slot * splits + split
    tl.store(part_lse + slot, natural, mask=chose)
    store_rows(part, slot * VALUE_DIM, result / total[:, None], chose & ~nothing, VALUE_DIM, V)


@triton.jit(do_not_specialize=VARY)
def _combine(
    part,
    part_lse,
    routes,
    out,
    lse,
    out_row,
    out_head,
    out_token,
    order,
    order_row,
    topk,
    splits,
    kv_heads,
    rows,
    queries,
    bh0,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Some dims of one row: its columns' splits in order, CHUNK at a time."""
    bh = bh0 + tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    b, head = batch_and_head(bh, kv_heads)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    routes += (bh.to(tl.int64) * rows + row) * topk
    first = tl.program_id(0).to(tl.int64) * topk * splits
    part += first * DIM
    part_lse += first

    top = float("-inf")
    total = 0.0
    result = tl.zeros([DIMS], tl.float32)
    for begin in range(0, topk * splits, CHUNK):
        slot = begin + tl.arange(0, CHUNK)
        inside = slot < topk * splits
        chose = tl.load(routes + slot // splits, mask=inside, other=-1) >= 0
        # Read whether written or not, for the three loads to be in flight together.
        one = tl.load(part_lse + slot, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (dim < DIM)[None, :]
        values = tl.load(part + slot[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        one = tl.where(chose, one, float("-inf")) * LOG2E
        peak = tl.maximum(top, tl.max(one, 0))
        base, shrink = rescale(top, peak, True)
        weight = tl.exp2(one - base)
        values = tl.where((weight > 0.0)[:, None], values, 0.0)
        result = result * shrink + tl.sum(values * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = peak

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _, member, query = locate(row, order + b * order_row, GROUP, SORTED)
    out += b * out_row + head * GROUP * out_head + offsets(member, query, out_head, out_token)
    tl.store(out + dim, (result / total).to(out.dtype.element_ty), mask=dim < DIM)
    if tl.program_id(1) == 0:
        natural = tl.where(nothing, float("-inf"), logsumexp(top, total))
        lse += (b * kv_heads + head) * GROUP * queries
        tl.store(lse + offsets(member, query, queries, 1), natural)


def fits(query: Tensor, layout: Layout) -> bool:
    """Whether a call has so few rows that `attend` serves it."""
    rows = query.shape[2] * layout.group
    padded = triton.next_power_of_2(max(rows, 16)) * triton.next_power_of_2(layout.topk)
    return 0 < rows <= MOST_ROWS and padded <= MOST_ROUTES


def split(batch_heads: int, topk: int, block: int, keys: int) -> tuple[int, int]:
    """How many splits a block has, and the keys of each, a multiple of a tile's."""
    wanted = triton.cdiv(PROGRAMS, batch_heads * topk)  # a kv head has K distinct blocks at least
    span = triton.cdiv(triton.cdiv(block, wanted), keys) * keys
    return triton.cdiv(block, span), span


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    routes: Tensor,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor]:
    """Attention of a call that `fits`.

    Args:
        query: [B, Hq, Nq, D]. key: [B, Hkv, Nk, D]. value: [B, Hkv, Nk, Dv]; of any strides.
        routes: int32 [B, Hkv, R, K], contiguous, -1 for none.
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, stored by token, and lse, float32 [B, Hq, Nq].
    """
    batch, heads, queries, dim = query.shape
    kv_heads, value_dim, topk = key.shape[1], value.shape[3], layout.topk
    rows = queries * layout.group
    out = empty_by_token(query, value_dim)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    query, key, value = (gpu_tile.inner_contiguous(tensor) for tensor in (query, key, value))
    width = max(dim, value_dim)
    made = gpu_tile.scores(query, key.shape[2], arguments)
    sought, blocks = layout.queries, layout.blocks
    extras = bool(made.BIAS or made.SOFTCAP or blocks.token is not None)
    config = configs.choose("decode", width, query.dtype, layout.block, query.device, extras)
    splits, span = split(batch * kv_heads, topk, layout.block, config.block_n)
    order, order_row = by_row(sought.index, sought.last)
    token, token_row = by_row(blocks.token, blocks.start)

    slots = rows * topk * splits
    step = max(1, min(batch * kv_heads, BUDGET // (slots * 4 * (value_dim + 1))))
    part = query.new_empty(step, slots, value_dim, dtype=torch.float32)
    part_lse = query.new_empty(step, slots, dtype=torch.float32)
    for bh0 in range(0, batch * kv_heads, step):
        here = min(step, batch * kv_heads - bh0)
        configs.launch(
            _attend,
            (here, rows * topk, splits),
            config,
            *(query, key, value, part, part_lse),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
            *(routes, sought.last, sought.last.stride(0), order, order_row),
            *(blocks.start, blocks.start.stride(0), token, token_row),
            *(made.bias, made.row, made.head, made.scale, made.softcap),
            *(topk, kv_heads, rows, bh0, layout.block, span, splits),
            GROUP=layout.group,
            KEY_DIM=dim,
            VALUE_DIM=value_dim,
            D=gpu_tile.padded(dim),
            V=gpu_tile.padded(value_dim),
            ROWS=min(config.block_m, max(16, triton.next_power_of_2(rows))),
            COLUMNS=triton.next_power_of_2(topk),
            KEYS=config.block_n,
            SORTED=sought.index is not None,
            PACKED=blocks.token is not None,
            PRECISION=gpu_tile.precision(query.dtype),
            **made.flags(),
        )
        _combine[here * rows, triton.cdiv(value_dim, DIMS)](
            *(part, part_lse, routes, out, lse, *out.stride()[:3], order, order_row),
            *(topk, splits, kv_heads, rows, queries, bh0),
            GROUP=layout.group,
            DIM=value_dim,
            DIMS=min(DIMS, gpu_tile.padded(value_dim)),
            CHUNK=min(CHUNK, triton.next_power_of_2(topk * splits)),
            SORTED=sought.index is not None,
            num_warps=4,
        )
    return out, lse
