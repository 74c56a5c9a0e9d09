"""Attention of small blocks: the block's keys stay, and the rows that chose it stream past.

    eq. 2   m = max L,  l = sum exp2(L - m),  O_j = exp2(L - m) V / l,  lse_j = (m + log2 l) ln 2

Where a block is one step of keys, a tile of forward.py would read K and V once for so few rows
that it would wait for them longer than it computes, and start nothing meanwhile. Here a program has
up to STEPS * ROWS routes of a block. It reads K and V once; the rows of later steps are on their
way while one is computed, and no softmax is carried from step to step.

Names as in forward.py.
"""

import torch
import triton
import triton.language as tl

from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.configs import Config
from moonfx.kernels.gpu.problem import STRIDES
from moonfx.kernels.gpu.tile import (
    batch_and_head,
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
    product,
    slots_of,
    store_rows,
    tile_of,
)

STEPS = 4  # of a program: K and V are then a quarter of what it reads beside its rows' results
# Shared memory for K, V and the rows of three steps, of two programs at a time.
CHIPS = ("sm_80", "sm_90", "sm_100", configs.INTERPRETER)


def configuration(
    dim: int, dtype: torch.dtype, block: int, device: torch.device, extras: bool
) -> Config | None:
    """Of `small_blocks`, or None where a block is more than a step of keys.

    Args:
        extras: scores have a bias or a softcap. Gathered keys are none: they come once.
    """
    if dtype.itemsize != 2 or configs.architecture(device) not in CHIPS:
        return None
    config = configs.choose("small", dim, dtype, block, device, extras)
    return config if block <= config.block_n else None


@triton.jit(
    do_not_specialize=[*STRIDES, "topk", "kv_heads", "n", "queries", "bh0", "row0", "pass_rows"]
)
def small_blocks(
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
    DIRECT: tl.constexpr,
    SORTED: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to STEPS * ROWS routes of one block of at most KEYS keys."""
    block, first, count = tile_of(tile_block, tile_first, tile_size, queries, GROUP, ROWS, True)
    if block < 0:
        return
    bh = block // n
    b, head = batch_and_head(bh, kv_heads)
    begin, limit = slots_of(start, size, b, block_row, block % n)
    place = begin + tl.arange(0, KEYS)
    inside = place < limit

    token += b * token_row
    origin, keys = key_places(token, begin, inside, KEYS, True, PACKED)
    if TMA:
        k = load_block(key, bh // kv_heads, bh % kv_heads, begin, KEYS, D)
        v = load_block(value, bh // kv_heads, bh % kv_heads, begin, KEYS, V)
    else:
        key += b * key_row + head * key_head
        value += b * value_row + head * value_head
        k = load_keys(key, origin, keys, key_token, inside, KEY_DIM, D, True)
        v = load_keys(value, origin, keys, value_token, inside, VALUE_DIM, V, True)

    query += b * query_row + head * GROUP * query_head
    bias += b * bias_row + head * GROUP * bias_head
    order += b * order_row
    last += b * last_row
    if DIRECT:
        out += b * out_row + head * GROUP * out_head
        lse += (b * kv_heads + head) * GROUP * queries
    factor = multiplier(scale, FOLD)
    for step in range(0, count, ROWS):
        row, column, valid = load_routes(entries, first + step, count - step, topk, ROWS, True)
        at, member, mine = locate(row, order, GROUP, SORTED)
        seen = tl.minimum(tl.load(last + at, mask=valid, other=-1), limit - 1)
        rows = load_rows(
            query, offsets(member, mine, query_head, query_token), valid, KEY_DIM, D, True
        )
        dots = product(rows, k.T, None, PRECISION)
        added = load_bias(
            bias, member[:, None], (origin + keys)[None, :], bias_head, inside[None, :], True, BIAS
        )
        logit, _ = logits(dots, added, scale, softcap, FOLD, SOFTCAP, BIAS)
        logit = tl.where(place[None, :] <= seen[:, None], logit, float("-inf"))
        top = tl.max(logit, 1) * factor
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(logit * factor - base[:, None])
        total = tl.sum(weight, 1)
        total = tl.where(total == 0.0, 1.0, total)
        result = product(weight.to(v.dtype), v, None, PRECISION) / total[:, None]
        natural = logsumexp(top, total)
        if DIRECT:
            to = offsets(member, mine, out_head, out_token)
            store_rows(out, to, result, valid, VALUE_DIM, V)
            tl.store(lse + offsets(member, mine, queries, 1), natural, mask=valid)
        else:
            slot = ((bh - bh0).to(tl.int64) * pass_rows + row - row0) * topk + column
            store_rows(out, slot * VALUE_DIM, result, valid, VALUE_DIM, V)
            tl.store(lse + slot, natural, mask=valid)
