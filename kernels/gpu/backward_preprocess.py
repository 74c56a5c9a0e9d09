"""What the backward's products need of each row, once: its logsumexp and its delta.

    delta = sum_d dO O - dlse           dS = P (dO V^T - delta), whatever blocks P is over

Both lie together, in the order of the rows: a gathered row costs one access for the two. The
logsumexp is kept for exp2, and inf for a row that saw nothing: its P is then 0 and never NaN. Nor
is its dS, whatever the gradient of a logsumexp of -inf: its delta is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    LOG2E,
    batch_and_head,
    by_row,
    load_rows,
    locate,
    offsets,
    padded,
)


@triton.jit(do_not_specialize=[*STRIDES, "kv_heads", "queries"])
def _delta(
    statistics,
    grad_out,
    out,
    lse,
    grad_lse,
    grad_row,
    grad_head,
    grad_token,
    out_row,
    out_head,
    out_token,
    order,
    order_row,
    kv_heads,
    queries,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    rows = queries * GROUP
    tiles = tl.cdiv(rows + 1, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = batch_and_head(bh, kv_heads)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.where(valid, row, 0)
    _, member, mine = locate(row, order + b * order_row, GROUP, SORTED)

    grad_out += b * grad_row + head * GROUP * grad_head
    out += b * out_row + head * GROUP * out_head
    from_grad = offsets(member, mine, grad_head, grad_token)
    from_out = offsets(member, mine, out_head, out_token)
    grads = load_rows(grad_out, from_grad, valid, DIM, PADDED, True).to(tl.float32)
    outs = load_rows(out, from_out, valid, DIM, PADDED, True).to(tl.float32)
    delta = tl.sum(grads * outs, 1)
    number = bh * rows + offsets(member, mine, queries, 1)
    natural = tl.load(lse + number, mask=valid, other=0.0)
    if GRAD_LSE:
        delta -= tl.load(grad_lse + number, mask=valid, other=0.0)
    nothing = ~valid | (natural == float("-inf"))
    statistics += bh * (rows + 1) * 2 + 2 * tl.where(valid, row, rows)
    tl.store(statistics, tl.where(nothing, float("inf"), natural * LOG2E))
    tl.store(statistics + 1, tl.where(nothing, 0.0, delta))


def statistics(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, layout: Layout
) -> Tensor:
    """log2(e) lse and delta of each row, float32 [B, Hkv, R + 1, 2]; the last are of no row.

    Args:
        grad_out, out: [B, Hq, Nq, Dv], their last stride 1.
        lse, grad_lse: float32 [B, Hq, Nq], contiguous; no grad_lse is zero.
    """
    batch, heads, queries, dim = out.shape
    kv_heads, rows = heads // layout.group, queries * layout.group
    result = lse.new_empty(batch, kv_heads, rows + 1, 2)
    config = configs.choose("delta", dim, out.dtype, layout.block, out.device)
    order, order_row = by_row(layout.queries.index, layout.queries.last)
    configs.launch(
        _delta,
        (batch * kv_heads * triton.cdiv(rows + 1, config.block_m),),
        config,
        *(result, grad_out, out, lse, lse if grad_lse is None else grad_lse),
        *(*grad_out.stride()[:3], *out.stride()[:3], order, order_row, kv_heads, queries),
        GROUP=layout.group,
        DIM=dim,
        PADDED=padded(dim),
        ROWS=config.block_m,
        SORTED=layout.queries.index is not None,
        GRAD_LSE=grad_lse is not None,
    )
    return result
