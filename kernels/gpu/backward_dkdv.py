"""dK, dV and the bias's gradient: a tile of keys walks the list of the rows that chose its block.

    P^T = exp2(L^T - log2(e) lse)              keys by rows, so that P^T and dS^T are the left
    dV = sum P^T dO                            operands of the sums as they come out of the
    dS^T = P^T (V dO^T - delta)                products before: in registers
    dK = sum (dS^T (1 - tanh^2)) Q scale
    db = sum dS^T of the rows of each head

A program keeps its keys' K, V, dK and dV, and gathers Q and dO of M rows at a time, for all the
heads of the group: GQA's sum is in its registers. It goes through the list in order and alone, so
that no sum depends on who came first. The rows' numbers are read one step ahead of the rows.

The first rows of a list are those of the block itself, which see a part of it: the plan says where
the loop that masks begins and where the one that does not (backward_schedule.py).

Shape letters as in forward.py; N keys of a tile, G heads of a group (padded to 16 for a bias).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu import tile as gpu_tile
from moonfx.kernels.gpu.backward_join import (
    BEGIN,
    BLOCK,
    END,
    ITEM,
    PLACE,
    WHOLE,
    in_scratch,
    join,
    keys_of,
    store_sums,
)
from moonfx.kernels.gpu.backward_schedule import plan
from moonfx.kernels.gpu.block_index import Index
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    by_row,
    load_bias,
    load_rows,
    locate,
    logits,
    multiplier,
    offsets,
    product,
)


@triton.jit
def _routes(entries, begin, at, count, ROWS: tl.constexpr, INDEXED: tl.constexpr):
    """A list's routes at .. at + ROWS - 1, of `count` from `begin` on; past them the last again."""
    place = tl.minimum(at + tl.arange(0, ROWS), count - 1)
    if INDEXED:
        return tl.load(entries + begin + place, mask=place >= 0, other=0)
    else:
        return begin.to(tl.int32) + place


@triton.jit
def _accumulate(
    grad_key,
    grad_value,
    grad_bias,
    keys,
    values,
    slot,
    index,
    inside,
    entries,
    begin,
    skip,
    count,
    query,
    query_head,
    query_token,
    grad_out,
    out_head,
    out_token,
    statistics,
    rows_of_head,
    last,
    order,
    bias,
    bias_head,
    scale,
    softcap,
    GROUP: tl.constexpr,
    TOPK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    INDEXED: tl.constexpr,
    SORTED: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the list's routes skip .. count - 1 to the sums. MASKED: a row sees slots <= last."""
    factor = multiplier(scale, FOLD)
    D: tl.constexpr = keys.shape[1]
    V: tl.constexpr = values.shape[1]
    if INDEXED:
        # Read two steps ahead, divided one step ahead: the rows' own loads then wait for nothing.
        row = _routes(entries, begin, skip, count, ROWS, True) // TOPK
        route = _routes(entries, begin, skip + ROWS, count, ROWS, True)
    for at in range(skip, count, ROWS):
        if not INDEXED:  # nothing to read: a number that was carried along would hinder the loads
            row = _routes(entries, begin, at, count, ROWS, False)
        place, member, mine = locate(row, order, GROUP, SORTED)
        from_query = offsets(member, mine, query_head, query_token)
        rows = load_rows(query, from_query, None, KEY_DIM, D, False)
        from_out = offsets(member, mine, out_head, out_token)
        grads = load_rows(grad_out, from_out, None, VALUE_DIM, V, False)
        # Past the end there is an lse of inf: P is 0.
        known = statistics + 2 * tl.where(at + tl.arange(0, ROWS) < count, row, rows_of_head)
        if INDEXED:
            row = route // TOPK
            route = _routes(entries, begin, at + 2 * ROWS, count, ROWS, True)

        dots = product(keys, rows.T, None, PRECISION)
        slope = product(values, grads.T, None, PRECISION)
        added = load_bias(
            bias, member[None, :], index[:, None], bias_head, inside[:, None], True, BIAS
        )
        logit, tanh = logits(dots, added, scale, softcap, FOLD, SOFTCAP, BIAS)
        lse = tl.load(known)  # read where it is used, as delta: 16 registers each
        weight = tl.exp2(logit * factor - lse[None, :])
        if MASKED:
            seen = tl.load(last + place)
            weight = tl.where(slot[:, None] <= seen[None, :], weight, 0.0)
        grad_value = product(weight.to(grads.dtype), grads, grad_value, PRECISION)
        delta = tl.load(known + 1)
        slope = weight * (slope - delta[None, :])
        if BIAS > 0:
            if GROUP == 1:
                grad_bias += tl.sum(slope, 1)[:, None]
            else:
                head = tl.arange(0, grad_bias.shape[1])
                heads = tl.where(member[:, None] == head[None, :], 1.0, 0.0).to(rows.dtype)
                grad_bias = product(slope.to(rows.dtype), heads, grad_bias, PRECISION)
        if SOFTCAP:
            slope = slope * (1.0 - tanh * tanh)
        grad_key = product(slope.to(rows.dtype), rows, grad_key, PRECISION)
    return grad_key, grad_value, grad_bias


@triton.jit(do_not_specialize=[*STRIDES, "kv_heads", "n", "queries", "length"])
def _walk(
    query,
    key,
    value,
    grad_out,
    statistics,
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
    grad_key,
    grad_key_row,
    grad_key_head,
    grad_key_token,
    grad_value,
    grad_value_row,
    grad_value_head,
    grad_value_token,
    grad_bias,
    scratch,
    items,
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
    kv_heads,
    n,
    queries,
    length,
    GROUP: tl.constexpr,
    TOPK: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    INDEXED: tl.constexpr,
    SORTED: tl.constexpr,
    PACKED: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item: the result of its tile, or its part of it in the scratch."""
    items += tl.program_id(0).to(tl.int64) * ITEM
    if tl.load(items + BLOCK) < 0:
        return
    b, head, slot, inside, index = keys_of(
        *(items, start, size, block_row, token, token_row, kv_heads, n, KEYS, PACKED)
    )
    bh = b * kv_heads + head
    begin = tl.load(items + BEGIN)
    count = (tl.load(items + END) - begin).to(tl.int32)
    partial = (tl.load(items + WHOLE) - begin).to(tl.int32)
    if not INDEXED:
        begin -= bh * queries * GROUP

    key += b * key_row + head * key_head
    value += b * value_row + head * value_head
    keys = load_rows(key, index * key_token, inside, KEY_DIM, D, True)
    values = load_rows(value, index * value_token, inside, VALUE_DIM, V, True)
    query += b * query_row + head * GROUP * query_head
    grad_out += b * out_row + head * GROUP * out_head
    statistics += bh * (queries * GROUP + 1) * 2
    last += b * last_row
    order += b * order_row
    bias += b * bias_row + head * GROUP * bias_head
    slots = slot + tl.arange(0, KEYS)
    sums_key = tl.zeros([KEYS, D], tl.float32)
    sums_value = tl.zeros([KEYS, V], tl.float32)
    sums_bias = tl.zeros([KEYS, HEADS], tl.float32)
    skip = 0
    if CAUSAL:
        skip = tl.minimum(tl.cdiv(partial, ROWS) * ROWS, count)
        sums_key, sums_value, sums_bias = _accumulate(
            *(sums_key, sums_value, sums_bias, keys, values, slots, index, inside),
            *(entries, begin, 0, skip),
            *(query, query_head, query_token, grad_out, out_head, out_token),
            *(statistics, queries * GROUP, last, order, bias, bias_head, scale, softcap),
            *(GROUP, TOPK, KEY_DIM, VALUE_DIM, ROWS, True),
            *(INDEXED, SORTED, FOLD, SOFTCAP, BIAS, PRECISION),
        )
    sums_key, sums_value, sums_bias = _accumulate(
        *(sums_key, sums_value, sums_bias, keys, values, slots, index, inside),
        *(entries, begin, skip, count),
        *(query, query_head, query_token, grad_out, out_head, out_token),
        *(statistics, queries * GROUP, last, order, bias, bias_head, scale, softcap),
        *(GROUP, TOPK, KEY_DIM, VALUE_DIM, ROWS, False),
        *(INDEXED, SORTED, FOLD, SOFTCAP, BIAS, PRECISION),
    )
    sums_key *= scale
    place = tl.load(items + PLACE)
    if place < 0:
        # Found again: kept over the loops, it would take registers from them.
        b, head, _, inside, index = keys_of(
            *(items, start, size, block_row, token, token_row, kv_heads, n, KEYS, PACKED)
        )
        store_sums(
            *(sums_key, sums_value, sums_bias, index, inside, b, head, kv_heads, length),
            *(grad_key, grad_key_row, grad_key_head, grad_key_token),
            *(grad_value, grad_value_row, grad_value_head, grad_value_token, grad_bias),
            *(GROUP, KEY_DIM, VALUE_DIM, BIAS),
        )
    else:
        WIDTH: tl.constexpr = D + V + (HEADS if BIAS > 0 else 0)
        tl.store(in_scratch(scratch, place, KEYS, WIDTH, 0, D), sums_key)
        tl.store(in_scratch(scratch, place, KEYS, WIDTH, D, V), sums_value)
        if BIAS > 0:
            tl.store(in_scratch(scratch, place, KEYS, WIDTH, D + V, HEADS), sums_bias)


def _unwritten(query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments) -> list[Tensor]:
    """Where dK, dV and db (with a bias) will be; 0 where a key may be in no block of a row."""
    results = [empty_by_token(x, x.shape[3]) for x in (key, value)]
    if arguments.key_bias is not None:
        shape = *query.shape[:2], key.shape[2]
        results.append(query.new_empty(shape, dtype=torch.float32))
    # Padding is in no block, nor may what is before the first query be in one that a row chose.
    if arguments.key_mask is not None or query.shape[2] != key.shape[2]:
        for result in results:
            result.zero_()
    return results


def gradients_of_keys(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: Tensor,
    layout: Layout,
    index: Index | None,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dK and dV by token in their dtypes, and float32 db [B, Hq, Nk] if there is a bias.

    Args:
        grad_out, query, key, value: their last strides 1. statistics: of backward_preprocess.py.
    """
    _, kv_heads, length, dim = key.shape
    value_dim = value.shape[3]
    group, queries = layout.group, query.shape[2]
    scores = gpu_tile.scores(query, length, arguments)
    config = configs.choose(
        *("dkdv", max(dim, value_dim), key.dtype, layout.block, key.device),
        extras=scores.extras(layout),
    )
    heads = 1 if group == 1 or scores.BIAS == 0 else gpu_tile.padded(group)
    columns = gpu_tile.padded(dim) + gpu_tile.padded(value_dim) + (heads if scores.BIAS else 0)
    todo = plan(index, layout, kv_heads, config.block_n, columns * config.block_n * 4)

    grad_key, grad_value, *biases = _unwritten(query, key, value, arguments)
    grad_bias = biases[0] if biases else statistics  # where there is none: not written
    scratch = statistics
    if todo.places:
        scratch = statistics.new_empty(todo.places, config.block_n, columns)
    order, order_row = by_row(layout.queries.index, layout.queries.last)
    token, token_row = by_row(layout.blocks.token, layout.blocks.start)
    blocks = layout.blocks.start, layout.blocks.size, layout.blocks.start.stride(0)
    last = layout.queries.last
    results = grad_key, *grad_key.stride()[:3], grad_value, *grad_value.stride()[:3], grad_bias
    constants: dict[str, Any] = {
        "GROUP": group,
        "HEADS": heads,
        "KEY_DIM": dim,
        "VALUE_DIM": value_dim,
        "D": gpu_tile.padded(dim),
        "V": gpu_tile.padded(value_dim),
        "KEYS": config.block_n,
        "PACKED": layout.blocks.token is not None,
    }
    configs.launch(
        _walk,
        (len(todo.items),),
        config,
        *(query, key, value, grad_out, statistics),
        *(x for tensor in (query, key, value, grad_out) for x in tensor.stride()[:3]),
        *(*results, scratch, todo.items, last if index is None else index.entries),
        *(last, last.stride(0), order, order_row, *blocks, token, token_row),
        *(scores.bias, scores.row, scores.head, scores.scale, scores.softcap),
        *(kv_heads, layout.n, queries, length),
        TOPK=layout.topk,
        ROWS=config.block_m,
        CAUSAL=layout.causal,
        INDEXED=index is not None,
        SORTED=layout.queries.index is not None,
        PRECISION=gpu_tile.precision(key.dtype),
        **constants,
        **scores.flags(),
    )
    if todo.places:
        configs.launch(
            join,
            (len(todo.items),),
            config,
            *(*results, scratch, todo.items, *blocks, token, token_row),
            *(kv_heads, layout.n, length),
            BIAS=scores.BIAS,
            **constants,
        )
    return grad_key, grad_value, grad_bias if scores.BIAS else None
