"""The best of many scores without a look across a row: three places for each column of a tile.

    key     a score's bits in an order that integers have, its last bits replaced by the tile's step
    keep    of each column the three best keys so far, a minimum and a maximum each; and of each row
            the best key that a column left out
    settle  the best of a row's columns, once

To find the best of a tile costs a reduction for each; to keep a column's costs eight operations on
a score, whatever it is. The result is proved, not assumed: it is that of `put` if the first key
that was left out, by its column or later, is below the last one chosen by more than the replaced
bits can tell. Otherwise (a tie, a column that had four of the best; of scores without a pattern,
about one tile of rows in fifty) the caller chooses again by `put`.
"""

import torch
import triton
import triton.language as tl

from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.route_table import empty, nothing, put

TABLE = 8  # blocks of a row: of more, too often four would be in one column
STEPS = 1023  # of more, too many bits of a score would be missing
# Chips whose products leave the registers to the keys: no operand has to be in one.
CHIPS = ("sm_90", "sm_100", configs.INTERPRETER)
LOWEST_KEY = tl.constexpr(-0x7F800000)  # of route_table.LOWEST; below it is no block


def suits(table: int, steps: int, device: torch.device) -> bool:
    """Whether it is to be tried for tables of that size, in programs of that many tiles."""
    few = 0 < table <= TABLE and steps <= STEPS
    return few and configs.architecture(device) in CHIPS


@triton.jit
def keys(score, step, steps):
    """int32 keys of scores in tile number `step`; `steps` is a mask of the bits for it."""
    order = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, which it equals
    order = order ^ ((order >> 31) & 0x7FFFFFFF)
    return (order & ~steps) | (steps - step)


@triton.jit
def no_keys(ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """What is kept before any key: three a column, and what they left out."""
    key = tl.full([ROWS, BLOCKS], nothing(tl.int32), tl.int32)
    return key, key, key, tl.full([ROWS], nothing(tl.int32), tl.int32)


@triton.jit
def keep(best, key):
    """What is kept once `key` is seen as well."""
    first, second, third, left_out = best
    rest = tl.minimum(first, key)
    first = tl.maximum(first, key)
    key = tl.minimum(second, rest)
    second = tl.maximum(second, rest)
    rest = tl.minimum(third, key)
    third = tl.maximum(third, key)
    return first, second, third, tl.maximum(left_out, tl.max(rest, 1))


@triton.jit
def settle(best, places, begin, steps, TABLE: tl.constexpr, BLOCKS: tl.constexpr):
    """The blocks of each row's best keys, int32 [M, TABLE], and whether any row is unsure.

    Args:
        places: int [M], how many a row has. begin: the block in column 0 of the first tile.
    """
    first, second, third, left_out = best
    scores, blocks, worst = empty(places, TABLE, tl.int32)
    for _ in range(3):  # each of the three once
        key = tl.where(first < LOWEST_KEY, nothing(tl.int32), first)
        step = steps - (key & steps)
        block = begin + step * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        scores, blocks, worst = put(scores, blocks, worst, key, block)
        first, second, third = second, third, first
    edge = worst & ~steps
    as_good = tl.sum(((first & ~steps) >= edge[:, None]).to(tl.int32), 1)
    as_good += tl.sum(((second & ~steps) >= edge[:, None]).to(tl.int32), 1)
    as_good += tl.sum(((third & ~steps) >= edge[:, None]).to(tl.int32), 1)
    full = (worst >= LOWEST_KEY) & (places > 0)
    unsure = (full & (as_good > places)) | (
        (left_out >= LOWEST_KEY) & ((left_out & ~steps) >= edge)
    )
    return blocks, tl.max(unsure.to(tl.int32), 0)
