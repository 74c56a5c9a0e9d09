"""Where the sums of dK, dV and the bias's gradient go: to the result, or to a scratch in parts.

A list of rows that is long is cut (backward_schedule.py). The sums of a part are a tile's keys by
D + V + HEADS numbers of the scratch: dK, dV, and db where there is a bias. `join` adds up the parts
of each tile, in their order.

Shape letters as in backward_dkdv.py.
"""

import triton
import triton.language as tl

from moonfx.kernels.gpu.backward_schedule import COLUMNS
from moonfx.kernels.gpu.problem import STRIDES
from moonfx.kernels.gpu.tile import store_rows

BLOCK, OFFSET, BEGIN, WHOLE, END, PLACE, PARTS, STEP = map(tl.constexpr, range(8))
ITEM = tl.constexpr(len(COLUMNS))


@triton.jit
def keys_of(
    items,
    start,
    size,
    block_row,
    token,
    token_row,
    kv_heads,
    n,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """An item's batch row and kv head, first slot, which of its N keys exist, and where: int64."""
    block = tl.load(items + BLOCK)
    b = block // n // kv_heads
    offset = tl.load(items + OFFSET).to(tl.int32)
    slot = tl.load(start + b * block_row + block % n) + offset
    place = tl.arange(0, KEYS)
    inside = place < tl.load(size + b * block_row + block % n) - offset
    index = slot + place
    if PACKED:
        index = tl.load(token + b * token_row + index, mask=inside, other=0)
    return b, block // n % kv_heads, slot, inside, index.to(tl.int64)


@triton.jit
def store_sums(
    sums_key,
    sums_value,
    sums_bias,
    index,
    inside,
    b,
    head,
    kv_heads,
    length,
    grad_key,
    grad_key_row,
    grad_key_head,
    grad_key_token,
    grad_value,
    grad_value_row,
    grad_value_head,
    grad_value_token,
    grad_bias,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The result of a tile's keys, `index` in their batch row."""
    grad_key += b * grad_key_row + head * grad_key_head
    store_rows(grad_key, index * grad_key_token, sums_key, inside, KEY_DIM, sums_key.shape[1])
    grad_value += b * grad_value_row + head * grad_value_head
    store_rows(
        grad_value, index * grad_value_token, sums_value, inside, VALUE_DIM, sums_value.shape[1]
    )
    if BIAS > 0:
        member = tl.arange(0, sums_bias.shape[1])
        grad_bias += (b * kv_heads + head) * GROUP * length
        pointers = grad_bias + member.to(tl.int64)[None, :] * length + index[:, None]
        tl.store(pointers, sums_bias, mask=inside[:, None] & (member < GROUP)[None, :])


@triton.jit
def in_scratch(
    scratch, place, KEYS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    """Pointers to columns FIRST .. FIRST + SIZE - 1 of the KEYS rows of WIDTH at a place."""
    row = place * KEYS + tl.arange(0, KEYS)
    return scratch + row[:, None] * WIDTH + FIRST + tl.arange(0, SIZE)[None, :]


@triton.jit(do_not_specialize=[*STRIDES, "kv_heads", "n", "length"])
def join(
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
    start,
    size,
    block_row,
    token,
    token_row,
    kv_heads,
    n,
    length,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The result of a tile whose list was cut: the sums of its parts, in their order."""
    items += tl.program_id(0).to(tl.int64) * ITEM
    parts = tl.load(items + PARTS)
    if parts == 0:
        return
    WIDTH: tl.constexpr = D + V + (HEADS if BIAS > 0 else 0)
    place = tl.load(items + PLACE)
    step = tl.load(items + STEP)
    sums_key = tl.zeros([KEYS, D], tl.float32)
    sums_value = tl.zeros([KEYS, V], tl.float32)
    sums_bias = tl.zeros([KEYS, HEADS], tl.float32)
    for _ in range(parts):
        sums_key += tl.load(in_scratch(scratch, place, KEYS, WIDTH, 0, D))
        sums_value += tl.load(in_scratch(scratch, place, KEYS, WIDTH, D, V))
        if BIAS > 0:
            sums_bias += tl.load(in_scratch(scratch, place, KEYS, WIDTH, D + V, HEADS))
        place += step
    b, head, _, inside, index = keys_of(
        *(items, start, size, block_row, token, token_row, kv_heads, n, KEYS, PACKED)
    )
    store_sums(
        *(sums_key, sums_value, sums_bias, index, inside, b, head, kv_heads, length),
        *(grad_key, grad_key_row, grad_key_head, grad_key_token),
        *(grad_value, grad_value_row, grad_value_head, grad_value_token, grad_bias),
        *(GROUP, KEY_DIM, VALUE_DIM, BIAS),
    )
