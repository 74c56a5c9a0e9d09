"""MoBA's attention on a GPU: flash attention of gathered rows over a block (arXiv 2502.13189).

    eq. 4   a tile is block_m routes (row, column) of one block j; its keys stream by block_n
    eq. 2   m = max L,  l = sum exp2(L - m),  O_j = exp2(L - m) V / l,  lse_j = (m + log2 l) ln 2
            over the keys of block j that the row sees: slot <= last[row]

Each route's O_j and lse_j go to the place of the route, and merge.py makes one softmax of a
row's K routes, in order. With one route per row a tile writes the result itself. Rows lie in
entries in ascending order, so that the rows of a tile see about as much: its first loop takes the
keys that they all see, unmasked, the second those that some see and the end of the block.

Tiles never wait for each other and nothing is added up in memory: results repeat bit for bit.

Shape letters: B batch, Hq = Hkv * G heads, R = Nq * G rows of a kv head, K routes of a row,
M rows and N keys of a tile, D and V the padded head and value dims.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.gpu import block_index, configs, forward_small_blocks
from moonfx.kernels.gpu import tile as gpu_tile
from moonfx.kernels.gpu.block_index import Index, Pass
from moonfx.kernels.gpu.merge import merge
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    BEYOND,
    batch_and_head,
    by_row,
    key_places,
    load_bias,
    load_block,
    load_keys,
    load_routes,
    load_rows,
    locate,
    logits,
    logsumexp,
    multiplier,
    offsets,
    padded,
    product,
    rescale,
    seen_slots,
    slots_of,
    store_rows,
    tile_of,
)


@triton.jit
def advance(
    top,
    total,
    result,
    rows,
    last,
    member,
    begin,
    end,
    limit,
    keys,
    key_token,
    values,
    value_token,
    bias,
    bias_head,
    token,
    scale,
    softcap,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr = False,
    b=0,
    head=0,
):
    """The softmax over slots begin .. end - 1, added to its state (m, l, O l).

    MASKED: a row sees slots up to `last`, and none from `limit` on. Otherwise all.
    TMA: `keys` and `values` are descriptors, of which head `head` of batch row b is read.
    """
    factor = multiplier(scale, FOLD)
    D: tl.constexpr = rows.shape[1]
    V: tl.constexpr = result.shape[1]
    for slot in range(begin, end, KEYS):
        place = slot + tl.arange(0, KEYS)
        inside = place < limit
        origin, index = key_places(token, slot, inside, KEYS, MASKED, PACKED)
        if TMA:
            key = load_block(keys, b, head, slot, KEYS, D)
        else:
            key = load_keys(keys, origin, index, key_token, inside, KEY_DIM, D, MASKED)
        dots = product(rows, key.T, None, PRECISION)
        added = load_bias(
            bias,
            member[:, None],
            (origin + index)[None, :],
            bias_head,
            inside[None, :],
            MASKED,
            BIAS,
        )
        logit, _ = logits(dots, added, scale, softcap, FOLD, SOFTCAP, BIAS)
        if MASKED:
            seen = (place[None, :] <= last[:, None]) & inside[None, :]
            logit = tl.where(seen, logit, float("-inf"))
        peak = tl.maximum(top, tl.max(logit, 1) * factor)
        # GUARDED: a row that has seen nothing yet, or only biases of -inf.
        base, shrink = rescale(top, peak, MASKED or BIAS > 0)
        weight = tl.exp2(logit * factor - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        result = result * shrink[:, None]
        if TMA:
            value = load_block(values, b, head, slot, KEYS, V)
        else:
            value = load_keys(values, origin, index, value_token, inside, VALUE_DIM, V, MASKED)
        result = product(weight.to(value.dtype), value, result, PRECISION)
        top = peak
    return top, total, result


@triton.jit(
    do_not_specialize=[*STRIDES, "topk", "kv_heads", "n", "queries", "bh0", "row0", "pass_rows"]
)
def _tiles(
    query,
    key,
    value,
    out,
    lse,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    out_row,
    out_head,
    out_token,
    tile_block,
    tile_first,
    tile_size,
    entries,
    last,
    last_row,
    order,
    order_row,
    start,
    size,
    block_row,
    token,
    token_row,
    bias,
    bias_row,
    bias_head,
    scale,
    softcap,
    topk,
    kv_heads,
    n,
    queries,
    bh0,
    row0,
    pass_rows,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INDEXED: tl.constexpr,
    DIRECT: tl.constexpr,
    SORTED: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile. DIRECT: `out` and `lse` are the result, else partial results of a pass."""
    block, first, count = tile_of(tile_block, tile_first, tile_size, queries, GROUP, ROWS, INDEXED)
    if INDEXED:  # noqa: SIM102 - elsewhere nothing is to be compiled
        if block < 0:
            return
    bh = block // n
    b, head = batch_and_head(bh, kv_heads)

    row, _, valid = load_routes(entries, first, count, topk, ROWS, INDEXED)
    place, member, mine = locate(row, order + b * order_row, GROUP, SORTED)
    seen = tl.load(last + b * last_row + place, mask=valid, other=BEYOND)
    begin, limit = slots_of(start, size, b, block_row, block % n)
    by_all, by_any = seen_slots(seen, valid, begin, limit, KEYS)

    query += b * query_row + head * GROUP * query_head
    rows = load_rows(query, offsets(member, mine, query_head, query_token), valid, KEY_DIM, D, True)
    if not TMA:
        key += b * key_row + head * key_head
        value += b * value_row + head * value_head
    bias += b * bias_row + head * GROUP * bias_head
    token += b * token_row
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, V], tl.float32)
    top, total, result = advance(
        *(top, total, result, rows, seen, member, begin, by_all, limit),
        *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
        *(KEY_DIM, VALUE_DIM, KEYS, False, PACKED, FOLD, SOFTCAP, BIAS, PRECISION),
        *(TMA, bh // kv_heads, bh % kv_heads),
    )
    top, total, result = advance(
        *(top, total, result, rows, seen, member, by_all, by_any, limit),
        *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
        *(KEY_DIM, VALUE_DIM, KEYS, True, PACKED, FOLD, SOFTCAP, BIAS, PRECISION),
        *(TMA, bh // kv_heads, bh % kv_heads),
    )

    # Read again: where to write, held through the loops, would not fit in registers. The barrier
    # keeps the two readings from becoming one.
    tl.debug_barrier()
    row, column, valid = load_routes(entries, first, count, topk, ROWS, INDEXED)
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing: 0, and -inf from top
    result = result / total[:, None]
    natural = logsumexp(top, total)
    if DIRECT:
        _, member, mine = locate(row, order + b * order_row, GROUP, SORTED)
        out += b * out_row + head * GROUP * out_head
        store_rows(out, offsets(member, mine, out_head, out_token), result, valid, VALUE_DIM, V)
        lse += (b * kv_heads + head) * GROUP * queries
        tl.store(lse + offsets(member, mine, queries, 1), natural, mask=valid)
    else:
        slot = ((bh - bh0).to(tl.int64) * pass_rows + row - row0) * topk + column
        store_rows(out, slot * VALUE_DIM, result, valid, VALUE_DIM, V)
        tl.store(lse + slot, natural, mask=valid)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    index: Index | None,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor]:
    """MoBA (eq. 2) along the routes of an index; None where a batch row is one block (n = 1).

    Args:
        query: [B, Hq, Nq, D], not empty. key: [B, Hkv, Nk, D]. value: [B, Hkv, Nk, Dv].
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, stored by token, and lse, float32 [B, Hq, Nq].
        0 and -inf for a row without a route.
    """
    query, key, value = (gpu_tile.inner_contiguous(x) for x in (query, key, value))
    out = empty_by_token(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    call = Call(query, key, value, layout, arguments)
    if index is None:
        call.run(None, out, lse, Pass(0, call.heads, 0, 0), 0, call.rows)
        return out, lse
    if layout.topk == 1:
        if layout.blocks.token is not None:  # there may be rows that see nothing
            out.zero_()
            lse.fill_(-torch.inf)
        call.run(index, out, lse, Pass(0, call.heads, 0, index.chunks), 0, call.rows)
        return out, lse
    width = value.shape[3] * out.element_size() + lse.element_size()
    for part in block_index.passes(index, width):
        row0, rows = block_index.rows_of(index, part)
        slots = part.bh1 - part.bh0, rows, layout.topk
        parts = query.new_empty(*slots, value.shape[3])
        parts_lse = lse.new_empty(slots)
        call.run(index, parts, parts_lse, part, row0, rows)
        merge(parts, parts_lse, index.routes, layout, part.bh0, row0, out, lse)
    return out, lse


class Call(NamedTuple):
    """What is the same in all passes of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    arguments: MobaArguments

    @property
    def heads(self) -> int:
        """Kv heads of all batch rows."""
        return self.key.shape[0] * self.key.shape[1]

    @property
    def rows(self) -> int:
        """Of a kv head."""
        return self.query.shape[2] * self.layout.group

    def run(
        self, index: Index | None, out: Tensor, lse: Tensor, part: Pass, row0: int, rows: int
    ) -> None:
        """Runs the tiles of a pass, of `rows` rows from row0; `out` and `lse` as in `_tiles`."""
        query, key, value, layout, arguments = self
        queries, blocks = layout.queries, layout.blocks
        scores = gpu_tile.scores(query, key.shape[2], arguments)
        bulk = blocks.token is None and gpu_tile.bulk(key) and gpu_tile.bulk(value)
        dim = max(query.shape[3], value.shape[3])
        of = dim, query.dtype, layout.block, query.device
        config = small = None
        if index is not None:
            config = small = forward_small_blocks.configuration(*of, not scores.FOLD)
        if config is None:
            config = configs.choose("forward", *of, scores.extras(layout))
        also: dict[str, Any] = {} if small else {"INDEXED": index is not None}
        read = [gpu_tile.descriptor(x, config.block_n) if bulk else x for x in (key, value)]
        order, order_row = by_row(queries.index, queries.last)
        token, token_row = by_row(blocks.token, blocks.start)
        direct = layout.topk == 1
        if index is None:
            grid = self.heads * triton.cdiv(rows, config.block_m)
            table = (blocks.start,) * 4  # not read
        else:
            span = config.block_m * (forward_small_blocks.STEPS if small else 1)
            tiles = block_index.tiles(index, part, span)
            grid = len(tiles.block)
            table = (*tiles, index.entries)
        configs.launch(
            forward_small_blocks.small_blocks if small else _tiles,
            (grid,),
            config,
            *(query, *read, out, lse),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
            *(out.stride()[:3] if direct else (0, 0, 0)),
            *(*table, queries.last, queries.last.stride(0), order, order_row),
            *(blocks.start, blocks.size, blocks.start.stride(0), token, token_row),
            *(scores.bias, scores.row, scores.head, scores.scale, scores.softcap),
            *(layout.topk, key.shape[1], layout.n, query.shape[2], part.bh0, row0, rows),
            GROUP=layout.group,
            KEY_DIM=query.shape[3],
            VALUE_DIM=value.shape[3],
            D=padded(query.shape[3]),
            V=padded(value.shape[3]),
            ROWS=config.block_m,
            KEYS=config.block_n,
            DIRECT=direct,
            SORTED=queries.index is not None,
            PACKED=blocks.token is not None,
            TMA=bulk,
            PRECISION=gpu_tile.precision(query.dtype),
            **scores.flags(),
            **also,
        )
