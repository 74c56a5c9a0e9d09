"""dQ: tiles of rows that chose a block stream its keys; a row's routes are then summed in order.

    P = exp2(L - log2(e) lse),  dS = P (dO V^T - delta)
    dQ_j = scale (dS (1 - tanh^2)) K            over the keys of block j that the row sees
    dQ = sum_j dQ_j                             j = 0 .. K - 1

As in forward.py a tile gathers M rows, once, and keeps them; each route's dQ_j goes to the
place of the route, in query's dtype, and with one route per row it is the result. So no two
programs add to the same number, and results repeat bit for bit, whatever the passes are.

Shape letters as in forward.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.gpu import block_index, configs
from moonfx.kernels.gpu import tile as gpu_tile
from moonfx.kernels.gpu.block_index import Index, Pass
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    BEYOND,
    batch_and_head,
    by_row,
    key_places,
    load_bias,
    load_keys,
    load_routes,
    load_rows,
    locate,
    logits,
    multiplier,
    offsets,
    pass_rows_of,
    product,
    seen_slots,
    slots_of,
    store_rows,
    tile_of,
)


@triton.jit
def _advance(
    result,
    rows,
    grads,
    lse,
    delta,
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
):
    """dQ / scale over slots begin .. end - 1, added to `result`.

    MASKED: a row sees slots up to `last`, and none from `limit` on. Otherwise all.
    """
    factor = multiplier(scale, FOLD)
    D: tl.constexpr = rows.shape[1]
    V: tl.constexpr = grads.shape[1]
    for slot in range(begin, end, KEYS):
        place = slot + tl.arange(0, KEYS)
        inside = place < limit
        origin, index = key_places(token, slot, inside, KEYS, MASKED, PACKED)
        key = load_keys(keys, origin, index, key_token, inside, KEY_DIM, D, MASKED)
        value = load_keys(values, origin, index, value_token, inside, VALUE_DIM, V, MASKED)
        dots = product(rows, key.T, None, PRECISION)
        added = load_bias(
            *(bias, member[:, None], (origin + index)[None, :], bias_head, inside[None, :]),
            *(MASKED, BIAS),
        )
        logit, tanh = logits(dots, added, scale, softcap, FOLD, SOFTCAP, BIAS)
        weight = tl.exp2(logit * factor - lse[:, None])
        if MASKED:
            seen = (place[None, :] <= last[:, None]) & inside[None, :]
            weight = tl.where(seen, weight, 0.0)
        slope = product(grads, value.T, None, PRECISION)
        slope = weight * (slope - delta[:, None])
        if SOFTCAP:
            slope = slope * (1.0 - tanh * tanh)
        result = product(slope.to(key.dtype), key, result, PRECISION)
    return result


@triton.jit(
    do_not_specialize=[*STRIDES, "topk", "kv_heads", "n", "queries", "bh0", "row0", "pass_rows"]
)
def _tiles(
    query,
    key,
    value,
    grad_out,
    statistics,
    grad_query,
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
    grad_row,
    grad_head,
    grad_token,
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
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile. DIRECT: `grad_query` is the result, else the partial results of a pass."""
    block, first, count = tile_of(tile_block, tile_first, tile_size, queries, GROUP, ROWS, INDEXED)
    if INDEXED:  # noqa: SIM102 - elsewhere nothing is to be compiled
        if block < 0:
            return
    bh = block // n
    b, head = batch_and_head(bh, kv_heads)

    row, column, valid = load_routes(entries, first, count, topk, ROWS, INDEXED)
    place, member, mine = locate(row, order + b * order_row, GROUP, SORTED)
    seen = tl.load(last + b * last_row + place, mask=valid, other=BEYOND)
    begin, limit = slots_of(start, size, b, block_row, block % n)
    by_all, by_any = seen_slots(seen, valid, begin, limit, KEYS)

    query += b * query_row + head * GROUP * query_head
    rows = load_rows(query, offsets(member, mine, query_head, query_token), valid, KEY_DIM, D, True)
    grad_out += b * out_row + head * GROUP * out_head
    grads = load_rows(
        grad_out, offsets(member, mine, out_head, out_token), valid, VALUE_DIM, V, True
    )
    statistics += bh.to(tl.int64) * (queries * GROUP + 1) * 2
    lse = tl.load(statistics + 2 * row, mask=valid, other=float("inf"))
    delta = tl.load(statistics + 2 * row + 1, mask=valid, other=0.0)
    key += b * key_row + head * key_head
    value += b * value_row + head * value_head
    bias += b * bias_row + head * GROUP * bias_head
    token += b * token_row
    result = tl.zeros([ROWS, D], tl.float32)
    result = _advance(
        *(result, rows, grads, lse, delta, seen, member, begin, by_all, limit),
        *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
        *(KEY_DIM, VALUE_DIM, KEYS, False, PACKED, FOLD, SOFTCAP, BIAS, PRECISION),
    )
    result = _advance(
        *(result, rows, grads, lse, delta, seen, member, by_all, by_any, limit),
        *(key, key_token, value, value_token, bias, bias_head, token, scale, softcap),
        *(KEY_DIM, VALUE_DIM, KEYS, True, PACKED, FOLD, SOFTCAP, BIAS, PRECISION),
    )
    result *= scale
    if DIRECT:
        grad_query += b * grad_row + head * GROUP * grad_head
        target = offsets(member, mine, grad_head, grad_token)
        store_rows(grad_query, target, result, valid, KEY_DIM, D)
    else:
        slot = ((bh - bh0).to(tl.int64) * pass_rows + row - row0) * topk + column
        store_rows(grad_query, slot * KEY_DIM, result, valid, KEY_DIM, D)


@triton.jit(do_not_specialize=[*STRIDES, "topk", "kv_heads", "queries", "bh0", "row0", "pass_rows"])
def _sum(
    part,
    routes,
    grad_query,
    grad_row,
    grad_head,
    grad_token,
    order,
    order_row,
    topk,
    kv_heads,
    queries,
    bh0,
    row0,
    pass_rows,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
):
    """The sums of some rows' partial results, adjacent in memory, by query."""
    bh, b, head, local, row, valid = pass_rows_of(bh0, row0, pass_rows, kv_heads, ROWS)
    _, member, mine = locate(row, order + b * order_row, GROUP, SORTED)
    routes += (bh.to(tl.int64) * queries * GROUP + row) * topk
    slot = ((bh - bh0).to(tl.int64) * pass_rows + local) * topk
    result = tl.zeros([ROWS, PADDED], tl.float32)
    for column in range(topk):
        there = valid & (tl.load(routes + column, mask=valid, other=-1) >= 0)
        result += load_rows(part, (slot + column) * DIM, there, DIM, PADDED, True).to(tl.float32)
    grad_query += b * grad_row + head * GROUP * grad_head
    store_rows(grad_query, offsets(member, mine, grad_head, grad_token), result, valid, DIM, PADDED)


def gradient_of_query(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: Tensor,
    layout: Layout,
    index: Index | None,
    arguments: MobaArguments,
) -> Tensor:
    """dQ [B, Hq, Nq, D] in query's dtype, by token; the arguments as of `gradients_of_keys`."""
    batch, kv_heads = key.shape[:2]
    rows, dim = query.shape[2] * layout.group, query.shape[3]
    grad_query = empty_by_token(query, dim)
    tensors = query, key, value, grad_out, statistics

    def run(target: Tensor, part: Pass, row0: int, count: int) -> None:
        _run(tensors, target, layout, index, arguments, part, row0, count)

    if index is None:
        run(grad_query, Pass(0, batch * kv_heads, 0, 0), 0, rows)
    elif layout.topk == 1:
        if layout.blocks.token is not None:  # there may be rows that see nothing
            grad_query.zero_()
        run(grad_query, Pass(0, batch * kv_heads, 0, index.chunks), 0, rows)
    else:
        for part in block_index.passes(index, dim * query.element_size()):
            row0, count = block_index.rows_of(index, part)
            partial = query.new_empty(part.bh1 - part.bh0, count, layout.topk, dim)
            run(partial, part, row0, count)
            _add_up(partial, index.routes, layout, part, row0, grad_query)
    return grad_query


def _run(
    tensors: tuple[Tensor, ...],
    target: Tensor,
    layout: Layout,
    index: Index | None,
    arguments: MobaArguments,
    part: Pass,
    row0: int,
    count: int,
) -> None:
    """Runs the tiles of a pass, of `count` rows from row0; `target` is `grad_query` of `_tiles`."""
    query, key, value, _, _ = tensors
    queries, blocks = layout.queries, layout.blocks
    dim = max(query.shape[3], value.shape[3])
    scores = gpu_tile.scores(query, key.shape[2], arguments)
    config = configs.choose(
        *("dq", dim, query.dtype, layout.block, query.device), extras=scores.extras(layout)
    )
    order, order_row = by_row(queries.index, queries.last)
    token, token_row = by_row(blocks.token, blocks.start)
    direct = layout.topk == 1
    if index is None:
        grid = part.bh1 * triton.cdiv(count, config.block_m)
        table: tuple[Tensor, ...] = (blocks.start,) * 4  # not read
    else:
        tiles = block_index.tiles(index, part, config.block_m)
        grid = len(tiles.block)
        table = (*tiles, index.entries)
    configs.launch(
        _tiles,
        (grid,),
        config,
        *(*tensors, target),
        *(x for tensor in tensors[:4] for x in tensor.stride()[:3]),
        *(target.stride()[:3] if direct else (0, 0, 0)),
        *(*table, queries.last, queries.last.stride(0), order, order_row),
        *(blocks.start, blocks.size, blocks.start.stride(0), token, token_row),
        *(scores.bias, scores.row, scores.head, scores.scale, scores.softcap),
        *(layout.topk, key.shape[1], layout.n, query.shape[2], part.bh0, row0, count),
        GROUP=layout.group,
        KEY_DIM=query.shape[3],
        VALUE_DIM=value.shape[3],
        D=gpu_tile.padded(query.shape[3]),
        V=gpu_tile.padded(value.shape[3]),
        ROWS=config.block_m,
        KEYS=config.block_n,
        INDEXED=index is not None,
        DIRECT=direct,
        SORTED=queries.index is not None,
        PACKED=blocks.token is not None,
        PRECISION=gpu_tile.precision(query.dtype),
        **scores.flags(),
    )


def _add_up(
    partial: Tensor, routes: Tensor, layout: Layout, part: Pass, row0: int, grad_query: Tensor
) -> None:
    """Writes the rows of a pass to grad_query, from their partial results [heads, rows, K, D]."""
    heads, rows, topk, dim = partial.shape
    config = configs.choose("merge", dim, partial.dtype, layout.block, partial.device)
    order, order_row = by_row(layout.queries.index, routes)
    configs.launch(
        _sum,
        (heads * triton.cdiv(rows, config.block_m),),
        config,
        *(partial, routes, grad_query, *grad_query.stride()[:3], order, order_row),
        *(topk, routes.shape[1], grad_query.shape[2], part.bh0, row0, rows),
        GROUP=layout.group,
        DIM=dim,
        PADDED=gpu_tile.padded(dim),
        ROWS=config.block_m,
        SORTED=layout.queries.index is not None,
    )
