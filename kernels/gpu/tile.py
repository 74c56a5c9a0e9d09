"""What the attention kernels share: which rows and keys a tile has, and how a score is made.

    L  = log2(e) S,  S = c tanh(scale q.k / c) + b      (softcap c, key bias b; or scale q.k)
    P  = exp2(L - log2(e) lse)                          the base 2 is the hardware's
    dR = scale (1 - tanh^2) dS,  dQ = dR K,  dK = dR^T Q

Plain scores are left as products, whose factor scale log2(e) then goes into one multiply-add with
the subtraction: FOLD. Masks and biases are given in the shape of a tile, either way round: [M, 1]
beside [1, N] for rows by keys, [1, M] beside [N, 1] for keys by rows.

A route is one number, row * K + column; its row r * G + g is the g-th head at the r-th place of
the sorted queries (problem.py).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.problem import Layout

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
BEYOND = tl.constexpr(2**31 - 1)  # after every slot
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Scores(NamedTuple):
    """How a call makes scores: kernel arguments, and flags that compile.

    Args:
        scale, softcap: as in MobaArguments; softcap is 1.0 where there is none.
        bias: float32 [B, Hq, Nk], its last stride 1; any tensor where there is none.
        row, head: its strides.
        FOLD: the factor scale log2(e) is not in `logits`, but in `multiplier`.
        BIAS: 0 for none, 1 for one that all heads share, 2 for one by head.
    """

    scale: float
    softcap: float
    bias: Tensor
    row: int
    head: int
    FOLD: bool
    SOFTCAP: bool
    BIAS: int

    def extras(self, layout: Layout) -> bool:
        """Whether a tile takes registers beyond those of folded scores of adjacent keys."""
        return not self.FOLD or layout.blocks.token is not None

    def flags(self) -> dict[str, Any]:
        return {"FOLD": self.FOLD, "SOFTCAP": self.SOFTCAP, "BIAS": self.BIAS}


def scores(query: Tensor, length: int, arguments: MobaArguments) -> Scores:
    """Of a query [B, Hq, Nq, D] and `length` keys."""
    scale = arguments.scale_for(query.shape[3])
    bias, row, head, kind = query, 0, 0, 0
    if arguments.key_bias is not None:
        bias = inner_contiguous(arguments.key_bias.detach().float())
        bias = bias.expand(*query.shape[:2], length)
        row, head = bias.stride()[:2]
        kind = 2 if head else 1
    softcap = arguments.softcap > 0
    # The maximum of products is that of scores only if the factor is positive.
    fold = scale > 0 and not softcap and kind == 0
    return Scores(scale, arguments.softcap or 1.0, bias, row, head, fold, softcap, kind)


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where a row of its last dimension is not adjacent in memory.

    A copy as well where 2**7 rows span 2**31 elements: offsets within a tile are 32 bits.
    """
    rows = tensor.stride(-2) if tensor.dim() > 1 else 0
    if tensor.stride(-1) == 1 and rows < 2**23:
        return tensor
    return tensor.contiguous()


def bulk(tensor: Tensor) -> bool:
    """Whether the bulk copy engine of NVIDIA's chips from 9.0 on (TMA) reads tiles of a tensor.

    It computes addresses in place of a tile's threads, which have their registers for scores.
    """
    if configs.architecture(tensor.device) not in ("sm_90", "sm_100", configs.INTERPRETER):
        return False
    outer = [s for s, n in zip(tensor.stride()[:-1], tensor.shape, strict=False) if n > 1]
    aligned = all(s > 0 and s * tensor.element_size() % 16 == 0 for s in outer)
    return aligned and tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1


def descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Of [B, H, N, X], in tiles of `rows` rows, zero beyond N and X."""
    shape, dim = list(tensor.shape), padded(tensor.shape[3])
    # The stride of a dimension of one is not used, but must be aligned.
    strides = [dim if n == 1 else s for s, n in zip(tensor.stride(), shape, strict=True)]
    return TensorDescriptor(tensor, shape, [*strides[:3], 1], [1, 1, rows, dim])


def by_row(tensor: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """A kernel's arguments for [B, ...] that may be absent: the tensor and its batch stride."""
    return (other, 0) if tensor is None else (tensor, tensor.stride(0))


def padded(dim: int) -> int:
    """The power of two that a head dim occupies in a tile; a product wants 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: three TF32 products are float32's to about 2**-21."""
    if dtype != torch.float32:
        return "ieee"  # not read for 16-bit operands
    if torch.version.hip is not None:
        return "ieee"
    # Set by torch.set_float32_matmul_precision or torch.backends.fp32_precision. Where it was the
    # latter, asking for the former is an error.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def product(left, right, added, PRECISION: tl.constexpr):
    """left @ right + added (None for zero) in float32. The interpreter would multiply bfloat16's
    bits as integers: there, operands are float32, which makes the products no more exact."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, added, input_precision=PRECISION)


@triton.jit
def multiplier(scale, FOLD: tl.constexpr):
    """What `logits` are to be multiplied by before exp2."""
    if FOLD:
        return scale * LOG2E
    else:
        return 1.0


@triton.jit
def logits(
    dots,
    bias,
    scale,
    softcap,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """From q.k: log2(e) S over `multiplier`, and the softcap's tanh (anything without one).

    tanh(x) = 1 - 2 / (exp(2 x) + 1) errs by 2**-23 at most, absolutely, which `softcap` scales.
    """
    if FOLD:
        return dots, dots
    score = dots * scale
    tanh = score
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / softcap)) + 1.0)
        score = tanh * softcap
    if BIAS > 0:
        score = score + bias
    return score * LOG2E, tanh


@triton.jit
def slope(tanh, scale, SOFTCAP: tl.constexpr):
    """dR / dS."""
    if SOFTCAP:
        return scale * (1.0 - tanh * tanh)
    else:
        return scale


@triton.jit
def load_bias(bias, member, index, head, seen, MASKED: tl.constexpr, BIAS: tl.constexpr):
    """Of keys `index`, for the heads `member` of a group; both in a tile's shape.

    Args:
        bias: the pointer to the bias of a batch row's first head of the group; head: its stride.
        seen: bool in index's shape; the others are not read, and 0.
    """
    if BIAS == 0:
        return 0.0
    else:
        if BIAS == 1:
            pointers = bias + index
        else:
            pointers = bias + member.to(tl.int64) * head + index
        if MASKED:
            return tl.load(pointers, mask=seen, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def batch_and_head(bh, kv_heads):
    """The batch row and the kv head of a (batch, kv head) number, int64."""
    return (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)


@triton.jit
def tile_of(
    tile_block,
    tile_first,
    tile_size,
    queries,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """This program's block (bh * n + j, -1 for none), its first route (int64) and how many.

    Not INDEXED: one block per batch row and tiles of its rows in order, the last rows first: they
    see the most keys, and a launch had better not end with its longest tiles.
    """
    tile = tl.program_id(0)
    if INDEXED:
        return tl.load(tile_block + tile), tl.load(tile_first + tile), tl.load(tile_size + tile)
    else:
        rows_of_head = queries * GROUP
        tiles = tl.cdiv(rows_of_head, ROWS)
        first = (tiles - 1 - tile % tiles).to(tl.int64) * ROWS
        return tile // tiles, first, tl.minimum(rows_of_head - first, ROWS)


@triton.jit
def slots_of(start, size, b, block_row, j):
    """The first slot of block j of batch row b, and the first past it."""
    begin = tl.load(start + b * block_row + j)
    return begin, begin + tl.load(size + b * block_row + j)


@triton.jit
def seen_slots(last, valid, begin, limit, KEYS: tl.constexpr):
    """Where the slots that all rows of a tile see end, in whole steps of KEYS, and those of any.

    Args:
        last: the last slot that each row sees; BEYOND where not valid.
    """
    by_all = tl.minimum(tl.min(last, 0) + 1, limit)
    by_any = tl.minimum(tl.max(tl.where(valid, last, -1), 0) + 1, limit)
    return begin + tl.maximum(by_all - begin, 0) // KEYS * KEYS, by_any


@triton.jit
def pass_rows_of(bh0, row0, pass_rows, kv_heads, ROWS: tl.constexpr):
    """Rows of a pass that are this program's: bh, b, head, their places in it, the rows, valid."""
    tiles = tl.cdiv(pass_rows, ROWS)
    bh = bh0 + tl.program_id(0) // tiles
    b, head = batch_and_head(bh, kv_heads)
    local = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    valid = local < pass_rows
    return bh, b, head, local, tl.where(valid, row0 + local, row0), valid


@triton.jit
def rescale(top, peak, GUARDED: tl.constexpr):
    """What exponents of a softmax are from once its maximum has risen from `top` to `peak`, and
    what its sums so far shrink by. GUARDED: there may be nothing but -inf yet."""
    base = peak
    if GUARDED:
        base = tl.where(peak == float("-inf"), 0.0, peak)
    return base, tl.exp2(top - base)


@triton.jit
def logsumexp(top, total):
    """The natural logarithm of a softmax's denominator, total * 2**top; -inf of a row that sees
    nothing, whose `total` is given as 1."""
    return (top + tl.log2(total)) * LN2


@triton.jit
def load_routes(entries, first, size, topk, ROWS: tl.constexpr, INDEXED: tl.constexpr):
    """row int32 [M], column int32 [M] and valid [M] of `size` routes from `first` (int64) on.

    Not INDEXED: the routes are the rows in order, in column 0. Invalid ones give row 0.
    """
    place = tl.arange(0, ROWS)
    valid = place < size
    if INDEXED:
        route = tl.load(entries + first + place, mask=valid, other=0)
        row = route // topk
        return row, route - row * topk, valid
    else:
        row = tl.where(valid, (first + place).to(tl.int32), 0)
        return row, tl.zeros_like(row), valid


@triton.jit
def locate(row, index, group: tl.constexpr, SORTED: tl.constexpr):
    """Each row's place r, head g and query, int32 [M].

    Args:
        index: of the batch row, the pointer to the query at each place; read if SORTED.
    """
    place = row // group
    query = place
    if SORTED:
        query = tl.load(index + place)
    return place, row - place * group, query


@triton.jit
def offsets(member, query, head, token):
    """int64 [M], from query 0 of the kv head's first head; head and token are strides."""
    return member.to(tl.int64) * head + query.to(tl.int64) * token


@triton.jit
def load_rows(base, offset, valid, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """[M, PADDED] rows of D elements at `base + offset`, 0 beyond D and where not valid."""
    dim = tl.arange(0, PADDED)
    pointers = base + offset[:, None] + dim[None, :]
    if MASKED:
        if D == PADDED:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=valid[:, None] & (dim < D)[None, :], other=0.0)
    else:
        if D == PADDED:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, offset, rows, valid, D: tl.constexpr, PADDED: tl.constexpr):
    """Stores the valid rows of [M, PADDED], in the dtype that `base` points to."""
    dim = tl.arange(0, PADDED)
    pointers = base + offset[:, None] + dim[None, :]
    rows = rows.to(base.dtype.element_ty)
    if D == PADDED:
        tl.store(pointers, rows, mask=valid[:, None])
    else:
        tl.store(pointers, rows, mask=valid[:, None] & (dim < D)[None, :])


@triton.jit
def key_places(token, slot, seen, KEYS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """The keys at KEYS slots from `slot` on: the one that offsets are from, and int [N] from there.

    Unpacked keys are adjacent: their offsets within a tile are 32 bits and do not change from tile
    to tile, which leaves the loads to the pipeline. `seen` masks the reading of PACKED ones' index.
    """
    offset = tl.arange(0, KEYS)
    if PACKED:
        if MASKED:
            index = tl.load(token + slot + offset, mask=seen, other=0)
        else:
            index = tl.load(token + slot + offset)
        return slot * 0, index.to(tl.int64)
    else:
        return slot, offset


@triton.jit
def load_keys(
    base,
    origin,
    index,
    stride,
    seen,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[N, PADDED] rows of keys or values by `key_places`, 0 beyond D and where not seen."""
    return load_rows(
        base + tl.cast(origin, tl.int64) * stride, index * stride, seen, D, PADDED, MASKED
    )


@triton.jit
def load_block(descriptor, b, head, slot, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """[ROWS, PADDED] of a [B, H, N, X] by its descriptor, from `slot` on, 0 beyond N and X."""
    return descriptor.load([b, head, slot, 0]).reshape([ROWS, PADDED])
