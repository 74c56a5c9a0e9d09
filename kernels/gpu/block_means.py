"""Block means for the gate, and how bfloat16 products of them stay exact.

    eq. 6   mean_j = 1 / |block j| sum of its real keys        float32, in an order that is fixed

A float32 is the sum of three bfloat16: hi = bf16(m), mid = bf16(m - hi), lo = m - hi - mid. Every
product of one with a bfloat16 is exact in float32, so that three fast matrix products give the
score of bfloat16 queries to float32's accuracy. Means are read once per tile of rows, and split
once per call.

A tile holds LANES tokens at a time of each of some blocks, and all dims: a lane adds up every
LANES-th token of its block, and the lanes are added as a tree. A key under padding is never read.

Shape letters: B batch, Hkv key/value heads, Hq query heads, Nk keys, D head dim, n blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.problem import STRIDES, Layout

BIASES = 256  # lanes of a program when a token has one number
SPLIT = 1024  # numbers that a program splits


def block_means(key: Tensor, layout: Layout) -> Tensor:
    """The mean of each block's real keys, float32 [B, Hkv, n, D]; 0 for a block without any.

    Args:
        key: [B, Hkv, Nk, D], of any strides.
    """
    config = configs.choose("means", key.shape[3], key.dtype, layout.block, key.device)
    return means(key, layout, config)


def bias_means(key_bias: Tensor, layout: Layout, heads: int) -> Tensor:
    """The mean of each block's real keys' biases, float32 [B, Hq, n].

    Args:
        key_bias: [B or 1, Hq or 1, Nk]. heads: Hq.
    """
    batch = layout.blocks.size.shape[0]
    bias = key_bias.expand(batch, heads, -1).unsqueeze(-1)
    return means(bias, layout, configs.Config(BIASES, 1, 4, 1)).squeeze(-1)


def means(source: Tensor, layout: Layout, config: configs.Config) -> Tensor:
    """Of [B, H, Nk, D], float32 [B, H, n, D]."""
    batch, heads, _, dim = source.shape
    blocks = layout.blocks
    out = source.new_empty(batch, heads, layout.n, dim, dtype=torch.float32)
    if out.numel() == 0:
        return out
    lanes = min(config.block_m, triton.next_power_of_2(layout.block))
    tiles = triton.cdiv(layout.n, config.block_m // lanes)
    configs.launch(
        bias_kernel if dim == 1 else mean_kernel,
        (tiles * batch * heads,),
        config,
        source,
        out,
        blocks.start,
        blocks.size,
        blocks.size if blocks.token is None else blocks.token,
        *source.stride(),
        blocks.start.stride(0),
        blocks.size.stride(0),
        0 if blocks.token is None else blocks.token.stride(0),
        heads,
        layout.n,
        tiles,
        ROWS=config.block_m,
        LANES=lanes,
        D=dim,
        PADDED=triton.next_power_of_2(dim),
        SORTED=blocks.token is not None,
    )
    return out


@triton.jit(do_not_specialize=[*STRIDES, "heads", "n", "tiles"])
def mean_kernel(
    source,
    out,
    start,
    size,
    token,
    source_row,
    source_head,
    source_token,
    source_dim,
    start_row,
    size_row,
    token_row,
    heads,
    n,
    tiles,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    SORTED: tl.constexpr,
):
    """ROWS / LANES blocks of one head: out[row, head, block] = mean of source over the block."""
    BLOCKS: tl.constexpr = ROWS // LANES
    pid = tl.program_id(0)
    head = pid // tiles
    first = (pid - head * tiles) * BLOCKS
    batch = (head // heads).to(tl.int64)
    source += batch * source_row + (head % heads).to(tl.int64) * source_head

    lane = tl.arange(0, ROWS)
    block = first + lane // LANES
    slot = tl.load(start + batch * start_row + block, mask=block < n, other=0) + lane % LANES
    left = tl.load(size + batch * size_row + block, mask=block < n, other=0) - lane % LANES
    dim = tl.arange(0, PADDED)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for step in range(0, tl.max(left, 0), LANES):
        here = left > step
        index = slot + step
        if SORTED:
            index = tl.load(token + batch * token_row + index, mask=here, other=0)
        pointers = source + index.to(tl.int64)[:, None] * source_token
        pointers += dim.to(tl.int64)[None, :] * source_dim
        mask = here[:, None] & (dim < D)[None, :]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(total, [BLOCKS, LANES, PADDED]), 1)

    block = first + tl.arange(0, BLOCKS)
    count = tl.load(size + batch * size_row + block, mask=block < n, other=0)
    mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    place = (head.to(tl.int64) * n + block)[:, None] * D + dim[None, :]
    tl.store(out + place, mean, mask=(block < n)[:, None] & (dim < D)[None, :])


# The same for numbers that lie by head and token: no stride of theirs is a multiple of a head dim.
BIAS_STRIDES = ["source_row", "source_head"]
bias_kernel = triton.jit(do_not_specialize=[*STRIDES, *BIAS_STRIDES, "heads", "n", "tiles"])(
    mean_kernel.fn
)


def parts(means: Tensor) -> Tensor:
    """hi, mid and lo of float32 [B, Hkv, n, D]: bfloat16 [3, B, Hkv, n, D]."""
    means = means.contiguous()
    out = means.new_empty(3, *means.shape, dtype=torch.bfloat16)
    if out.numel() > 0:
        grid = (triton.cdiv(means.numel(), SPLIT),)
        part_kernel[grid](means, out, means.numel(), SIZE=SPLIT, num_warps=4)
    return out


@triton.jit(do_not_specialize=["count"])
def part_kernel(means, out, count, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = place < count
    hi, mid, lo = three_parts(tl.load(means + place, mask=here, other=0.0))
    out += place
    tl.store(out, hi, mask=here)
    tl.store(out + count, mid, mask=here)
    tl.store(out + 2 * count.to(tl.int64), lo, mask=here)


@triton.jit
def three_parts(number):
    """hi, mid and lo in bfloat16; of an infinity, itself and zeros."""
    hi = number.to(tl.bfloat16)
    rest = tl.where(tl.abs(number) < float("inf"), number - hi.to(tl.float32), 0.0)
    mid = rest.to(tl.bfloat16)
    lo = (rest - mid.to(tl.float32)).to(tl.bfloat16)
    return hi, mid, lo
