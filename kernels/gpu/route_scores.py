"""The gate's scores of a tile of rows and blocks, as exact as float32's own product.

    eq. 6   s_j = q . mean_j + bias_j / scale

Queries and means are sums of bfloat16 parts (block_means.py): a query of one for bfloat16, two for
float16, three for float32. Products of parts are exact; only those below 2**-26 of the whole are
left out, so that 3, 5 or 6 products are taken, the smallest first.
"""

import triton
import triton.language as tl

from moonfx.kernels.gpu.block_means import three_parts
from moonfx.kernels.gpu.route_table import INTERPRETED, ranked


@triton.jit
def tile_scores(
    start,
    stop,
    queries,
    candidates,
    means,
    means_part,
    means_block,
    bias,
    bias_head,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """float32 [M, BLOCKS], `ranked`, of the blocks from `start` on; -inf where not a candidate.

    Args:
        queries: parts hi, mid and lo [M, PADDED], if that is CHUNK; the pointer to the queries, the
            offset of each row and whether there is one; its head, for the bias.
        candidates: of each row, from which block to which, and its own; within which bounds every
            block is a candidate of every row, but for those of the bounds of own blocks.
    """
    q, q_mid, q_lo, query, rows, valid, head = queries
    low, high, own, all_from, all_to, own_from, own_to = candidates
    block = start + tl.arange(0, BLOCKS)
    # A tile's last blocks may lie after the last mean: then that is read again.
    near = tl.minimum(block, stop - 1).to(tl.int64) * means_block
    score = tl.zeros([valid.shape[0], BLOCKS], tl.float32)
    for d in tl.static_range(0, D, CHUNK):
        if CHUNK < PADDED:
            q, q_mid, q_lo = query_parts(query, rows, valid, d, D, CHUNK, PARTS)
        hi, mid, lo = mean_parts(means, near, means_part, d, D, CHUNK, SPLIT)
        if PARTS == 3:
            score = product(q_lo, hi, score)
        if PARTS >= 2:
            score = product(q_mid, mid, score)
        score = product(q, lo, score)
        if PARTS >= 2:
            score = product(q_mid, hi, score)
        score = product(q, mid, score)
        score = product(q, hi, score)
    if BIAS:
        pointers = bias + head[:, None] * bias_head + block[None, :]
        score += tl.load(pointers, mask=valid[:, None] & (block < stop)[None, :], other=0.0)
    score = ranked(score)
    inside = (start >= all_from) & (start + BLOCKS <= all_to)
    if not CAUSAL:
        inside = inside & ((start > own_to) | (start + BLOCKS <= own_from))
    if not inside:
        able = (block[None, :] >= low[:, None]) & (block[None, :] < high[:, None])
        if not CAUSAL:
            able = able & (block[None, :] != own[:, None])
        score = tl.where(able, score, -float("inf"))
    return score


@triton.jit
def query_parts(
    query,
    rows,
    valid,
    start,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Numbers `start` to start + CHUNK of a tile's queries: hi, mid and lo, or one part thrice."""
    dim = start + tl.arange(0, CHUNK)
    mask = valid[:, None] & (dim < D)[None, :]
    q = tl.load(query + rows[:, None] + dim[None, :], mask=mask, other=0.0)
    if PARTS == 1:
        return q, q, q
    else:
        return three_parts(q.to(tl.float32))


@triton.jit
def mean_parts(
    means,
    rows,
    part,
    start,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Numbers `start` to start + CHUNK of a tile's means: hi, mid and lo. SPLIT: they are whole."""
    dim = start + tl.arange(0, CHUNK)
    pointers = means + rows[:, None] + dim[None, :]
    if SPLIT:
        return three_parts(load_dims(pointers, dim, start + CHUNK <= D, D))
    else:
        hi = load_dims(pointers, dim, start + CHUNK <= D, D)
        mid = load_dims(pointers + part, dim, start + CHUNK <= D, D)
        lo = load_dims(pointers + 2 * part, dim, start + CHUNK <= D, D)
        return hi, mid, lo


@triton.jit
def load_dims(pointers, dim, FULL: tl.constexpr, D: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def product(q, mean, score):
    """score + q mean^T."""
    if INTERPRETED:  # NumPy has no bfloat16
        q, mean = q.to(tl.float32), mean.to(tl.float32)
    return tl.dot(q, tl.trans(mean), score)
