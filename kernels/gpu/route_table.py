"""The best-scored blocks of each row so far: a small table in registers, and how routes leave it.

    put     while a row's best new score beats its table's worst: they change places
    ties    the lower block is kept, and comes in first: blocks are put in ascending order
    write   column 0 the own block, then the sinks, then the table, ascending; -1 for none

An empty place holds -inf, a place that a row does not have +inf; neither has a block (< 0), and
all blocks of a row's table differ. A score is never below LOWEST: a NaN and -inf count as that, so
that neither comes before a number; -inf stands for a block that is no candidate.
"""

import os

import triton
import triton.language as tl

# The interpreter computes with NumPy.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32, -inf excepted
BEYOND = tl.constexpr(2**31 - 1)  # after every block


@triton.jit
def ranked(score):
    """Scores in the order of blocks: none is a NaN, none is below LOWEST."""
    if INTERPRETED:  # whose maximum is a NaN where a number is one
        return tl.where(score >= LOWEST, score, LOWEST)
    else:
        return tl.maximum(score, LOWEST)


@triton.constexpr_function
def nothing(dtype):
    return -float("inf") if dtype == tl.float32 else -(2**31)


@triton.constexpr_function
def everything(dtype):
    return float("inf") if dtype == tl.float32 else 2**31 - 1


@triton.jit
def empty(places, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """The scores [M, TABLE], the blocks [M, TABLE] and the worst score [M] of an empty table.

    Args:
        places: int [M], how many places each row has, TABLE at most.
    """
    column = tl.arange(0, TABLE)[None, :]
    blocks = tl.broadcast_to(-1 - column, [places.shape[0], TABLE])
    scores = tl.where(column < places[:, None], nothing(DTYPE), everything(DTYPE)).to(DTYPE)
    return scores, blocks, tl.min(scores, 1)


@triton.jit
def put(scores, blocks, worst, score, block):
    """A table into which `score` [M, N], of blocks [M, N] or [1, N], was put.

    The work is a few reductions for each score that comes in, of the row that has most of them;
    blocks that come later seldom beat many earlier ones. The loop is inside a branch because
    Triton overlaps loads with work only in loops whose body holds no other.
    """
    best = tl.max(score, 1)
    more = tl.max((best > worst).to(tl.int32), 0)
    if more > 0:
        while more > 0:
            new = tl.min(tl.where(score == best[:, None], block, BEYOND), 1)
            old = tl.max(tl.where(scores == worst[:, None], blocks, -BEYOND), 1)
            here = (blocks == old[:, None]) & (best > worst)[:, None]
            scores = tl.where(here, best[:, None], scores)
            blocks = tl.where(here, new[:, None], blocks)
            worst = tl.min(scores, 1)
            score = tl.where(block == new[:, None], nothing(score.dtype), score)
            best = tl.max(score, 1)
            more = tl.max((best > worst).to(tl.int32), 0)
    return scores, blocks, worst


@triton.jit
def fixed_blocks(own, first, end, sinks):
    """How many of a row's routes are not scored, and how many of its sequence's sinks there are.

    Args:
        own, first, end: int [M], as in problem.Queries.
    """
    there = tl.where(own >= 0, tl.minimum(tl.maximum(end - first, 0), sinks), 0)
    return tl.where(own - first < there, there, there + 1), there


@triton.jit
def write(
    routes,
    row,
    rows,
    own,
    first,
    end,
    blocks,
    topk,
    sinks,
    slots,
    TABLE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the routes of rows `row` [M] into `routes`, a kv head's [rows, topk].

    Args:
        slots: how many columns are from the table.
    """
    fixed, there = fixed_blocks(own, first, end, sinks)
    valid = (row < rows)[:, None]
    routes += row.to(tl.int64)[:, None] * topk

    for start in range(0, topk, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        sink = first[:, None] + column - 1
        sink += ((own - first < there)[:, None] & (sink >= own[:, None])).to(tl.int32)
        value = tl.where(column == 0, own[:, None], tl.where(column < fixed[:, None], sink, -1))
        outside = (column < fixed[:, None]) | (column >= fixed[:, None] + slots)
        tl.store(routes + column, value, mask=valid & outside & (column < topk))

    if TABLE > 0:
        blocks = tl.sort(tl.where(blocks < 0, BEYOND, blocks), 1)
        blocks = tl.where(blocks == BEYOND, -1, blocks)
        place = tl.arange(0, TABLE)[None, :]
        column = place + fixed[:, None]
        tl.store(routes + column, blocks, mask=valid & (place < slots) & (column < topk))
