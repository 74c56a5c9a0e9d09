"""One softmax over all the routes of a row.

    lse = log sum_j exp(lse_j),  O = sum_j exp(lse_j - lse) O_j        j = 0 .. K - 1, in order

A program reads the K partial results of some rows, adjacent in memory, and writes them by query;
the sum's order is the routes', whatever order the tiles ran in.
"""

import triton
import triton.language as tl
from torch import Tensor

from moonfx.kernels.gpu import configs
from moonfx.kernels.gpu.problem import STRIDES, Layout
from moonfx.kernels.gpu.tile import (
    LOG2E,
    by_row,
    load_rows,
    locate,
    logsumexp,
    offsets,
    padded,
    pass_rows_of,
    rescale,
    store_rows,
)


@triton.jit(do_not_specialize=[*STRIDES, "topk", "kv_heads", "queries", "bh0", "row0", "pass_rows"])
def _merge(
    part,
    part_lse,
    routes,
    out,
    lse,
    out_row,
    out_head,
    out_token,
    order,
    order_row,
    topk,
    kv_heads,
    queries,
    bh0,
    row0,
    pass_rows,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
):
    bh, b, head, local, row, valid = pass_rows_of(bh0, row0, pass_rows, kv_heads, ROWS)
    _, member, mine = locate(row, order + b * order_row, GROUP, SORTED)

    routes += bh.to(tl.int64) * queries * GROUP * topk + row.to(tl.int64) * topk
    slot = ((bh - bh0).to(tl.int64) * pass_rows + local) * topk
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED], tl.float32)
    for column in range(topk):
        there = valid & (tl.load(routes + column, mask=valid, other=-1) >= 0)
        one = tl.load(part_lse + slot + column, mask=there, other=float("-inf")) * LOG2E
        peak = tl.maximum(top, one)
        base, shrink = rescale(top, peak, True)
        weight = tl.exp2(one - base)
        rows = load_rows(part, (slot + column) * DIM, there, DIM, PADDED, True)
        result = result * shrink[:, None] + rows.to(tl.float32) * weight[:, None]
        total = total * shrink + weight
        top = peak

    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing: 0, and -inf from top
    result = result / total[:, None]
    natural = logsumexp(top, total)
    out += b * out_row + head * GROUP * out_head
    store_rows(out, offsets(member, mine, out_head, out_token), result, valid, DIM, PADDED)
    lse += (b * kv_heads + head) * GROUP * queries
    tl.store(lse + offsets(member, mine, queries, 1), natural, mask=valid)


def merge(
    part: Tensor,
    part_lse: Tensor,
    routes: Tensor,
    layout: Layout,
    bh0: int,
    row0: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes rows row0 .. of kv heads bh0 .. to out [B, Hq, Nq, Dv] and lse [B, Hq, Nq].

    Args:
        part: [heads, rows, K, Dv], read where a row has a route. part_lse: float32 [.., K].
        routes: int32 [B, Hkv, R, K], contiguous. out: of any strides. lse: contiguous.
    """
    heads, rows, topk, dim = part.shape
    config = configs.choose("merge", dim, part.dtype, layout.block, part.device)
    order, order_row = by_row(layout.queries.index, routes)
    configs.launch(
        _merge,
        (heads * triton.cdiv(rows, config.block_m),),
        config,
        *(part, part_lse, routes, out, lse, *out.stride()[:3], order, order_row),
        *(topk, routes.shape[1], out.shape[2], bh0, row0, rows),
        GROUP=layout.group,
        DIM=dim,
        PADDED=padded(dim),
        ROWS=config.block_m,
        SORTED=layout.queries.index is not None,
    )
