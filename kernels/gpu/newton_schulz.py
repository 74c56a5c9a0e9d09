"""Newton-Schulz steps on a GPU: symmetric products in Triton, the others by torch.baddbmm.

    C = alpha L R^T + beta M + gamma N        C, M, N symmetric [m, m]; L, R [m, k]

serves them all: X X^T with L = R = X, and b A + c A A, a B + Z B, ... of symmetric matrices, whose
rows are their columns (moonfx/ops/newton_schulz_runs.py has the algebra). A program computes one
square tile on or below the diagonal and stores it twice, the second time transposed: half of the
products' FLOPs. Sums are float32 and rounded once, after alpha, beta and gamma. float32 is
multiplied as tile.precision says.

Grid: the tiles of a matrix's triangle, times the batch. Tiles are square, and as large as the
accumulators' registers allow, for what a tile reads goes with its side and what it computes with
the square of it; several stages of `depth` columns are in flight. They go by strips of GROUP rows,
column by column, so that the programs of one wave share what they read: with 64 tiles a side 132
programs read 31 rows of tiles at most, where they would read 64 row by row. X may lie by rows or by
columns.

No timing of it exists yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients
from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.configs import Config
from moonfx.kernels.gpu.tile import precision, product

# Side and depth of a tile, warps, stages: by chip and bytes of a number.
TILES = {
    ("sm_80", 2): Config(128, 64, 8, 3),
    ("sm_86", 2): Config(128, 32, 8, 3),
    ("sm_90", 2): Config(128, 64, 8, 4),
    ("sm_100", 2): Config(128, 64, 8, 4),
    ("gfx942", 2): Config(128, 32, 8, 2),
    (configs.INTERPRETER, 2): Config(32, 32, 4, 1),
    (configs.INTERPRETER, 4): Config(32, 32, 4, 1),
}
FLOAT32 = Config(64, 32, 4, 3)
GROUP = tl.constexpr(8)


def tile_of(device: torch.device, dtype: torch.dtype) -> Config:
    return TILES.get((configs.architecture(device), dtype.itemsize), FLOAT32)


def newton_schulz(X: Tensor, coefficients: Coefficients, runs: tuple[int, ...]) -> Tensor:
    """The steps of [b, m, n], m <= n and none 0, in new memory; by columns if X lies by columns.

    Args:
        runs: how many steps go on between two visits of X; they sum to the number of steps.
    """
    X = X.detach()
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(X):
        return _newton_schulz(X, coefficients, runs)


def _newton_schulz(X: Tensor, coefficients: Coefficients, runs: tuple[int, ...]) -> Tensor:
    by_columns = X.stride(1) == 1 and X.stride(2) != 1
    steps = iter(coefficients)
    for run in runs:
        A = symmetric(X, X)
        for step in range(run):
            a, b, c = next(steps)
            Z = symmetric(A, A, c, (A, b))
            if step == 0:
                q, Q = a, Z
            else:
                Q = symmetric(Z, Q, 1.0, (Q, a), (Z, q))
                q *= a
            if step + 1 < run:
                B = symmetric(Z, A, 1.0, (A, a))
                A = symmetric(Z, B, 1.0, (B, a))
        if by_columns:
            X = torch.baddbmm(X.mT, X.mT, Q, beta=q).mT
        else:
            X = torch.baddbmm(X, Q, X, beta=q)
    return X


Term = tuple[Tensor, float]


def symmetric(
    left: Tensor, right: Tensor, alpha: float = 1.0, first: Term | None = None,
    second: Term | None = None,
) -> Tensor:  # fmt: skip
    """alpha left right^T + the terms, [b, m, m], of which half is computed.

    Args:
        left, right: [b, m, k] of one dtype and any strides, whose product is symmetric.
        first, second: contiguous [b, m, m] and what they are multiplied by.
    """
    batch, m, depth = left.shape
    out = left.new_empty(batch, m, m)
    config = tile_of(left.device, left.dtype)
    tiles = triton.cdiv(m, config.block_m)
    M, beta = first or (out, 0.0)
    N, gamma = second or (out, 0.0)
    configs.launch(
        symmetric_kernel,
        (batch * (tiles * (tiles + 1) // 2),),
        config,
        left,
        right,
        M,
        N,
        out,
        alpha,
        beta,
        gamma,
        m,
        depth,
        *left.stride(),
        *right.stride(),
        TERMS=0 if first is None else 1 if second is None else 2,
        SIDE=config.block_m,
        DEPTH=config.block_n,
        WHOLE=depth % config.block_n == 0,
        PRECISION=precision(left.dtype),
    )
    return out


@triton.jit
def corner(place):
    """Row and column of the place-th tile of a triangle, row by row, the diagonal included."""
    # Row i begins at i (i + 1) / 2; the root may be off by one after rounding.
    i = ((tl.sqrt(8.0 * place + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > place, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= place, i + 1, i)
    return i, place - i * (i + 1) // 2


@triton.jit
def in_strips(place, tiles):
    """Row and column of the place-th tile, by strips of GROUP rows: column by column, then the
    strip's own triangle. A strip has the same places as its rows have row by row."""
    i, _ = corner(place)
    first = i // GROUP * GROUP
    rows = tl.minimum(GROUP, tiles - first)
    place -= first * (first + 1) // 2
    below = place < first * rows
    i, j = corner(tl.where(below, 0, place - first * rows))
    return (
        first + tl.where(below, place % rows, i),
        tl.where(below, place // rows, first + j),
    )


@triton.jit
def symmetric_kernel(
    left,
    right,
    first,
    second,
    out,
    alpha,
    beta,
    gamma,
    m,
    depth,
    left_batch,
    left_row,
    left_column,
    right_batch,
    right_row,
    right_column,
    TERMS: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(m, SIDE)
    each = tiles * (tiles + 1) // 2
    batch = (tl.program_id(0) // each).to(tl.int64)
    i, j = in_strips(tl.program_id(0) % each, tiles)

    # A tile begins anywhere in 64 bits; within it 32 are enough, and take half the registers.
    side = tl.arange(0, SIDE)
    k = tl.arange(0, DEPTH)
    row, column = i * SIDE, j * SIDE
    left += batch * left_batch + row.to(tl.int64) * left_row
    right += batch * right_batch + column.to(tl.int64) * right_row
    x_at = left + (side[:, None] * left_row + k[None, :] * left_column)
    y_at = right + (k[:, None] * right_column + side[None, :] * right_row)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for at in range(0, depth, DEPTH):
        here = k < (DEPTH if WHOLE else depth - at)
        x = tl.load(x_at, mask=(side < m - row)[:, None] & here[None, :], other=0.0)
        y = tl.load(y_at, mask=here[:, None] & (side < m - column)[None, :], other=0.0)
        total = product(x, y, total, PRECISION)
        x_at += DEPTH * left_column
        y_at += DEPTH * right_column
    total *= alpha

    base = batch * m * m
    below = base + row.to(tl.int64) * m + column
    at = side[:, None] * m + side[None, :]
    inside = (side < m - row)[:, None] & (side < m - column)[None, :]
    if TERMS >= 1:
        total += beta * tl.load(first + below + at, mask=inside, other=0.0).to(tl.float32)
    if TERMS >= 2:
        total += gamma * tl.load(second + below + at, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    mirrored = tl.trans(result)
    if i == j:
        # Of a tile on the diagonal too only the lower half counts: A is to be exactly symmetric.
        result = tl.where(side[:, None] >= side[None, :], result, mirrored)
    # Masks of whole rows and columns only: with one of single numbers each would be stored alone.
    tl.store(out + below + at, result, mask=inside)
    if i != j:
        above = base + column.to(tl.int64) * m + row
        inside = (side < m - column)[:, None] & (side < m - row)[None, :]
        tl.store(out + above + at, mirrored, mask=inside)
