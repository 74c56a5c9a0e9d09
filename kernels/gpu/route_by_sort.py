"""Routes of more blocks than a table in registers is for: torch operations, some rows at a time.

The order is that of kernels/gpu/route.py: a score as a sortable integer, above the complement of
the block's number. So no two are equal, and whatever way the largest are found they are the same.

Scratch is about SCRATCH bytes, or what one query of every head takes.
"""

import torch
from torch import Tensor

from moonfx.kernels.common.exact import exact_float32, sortable
from moonfx.kernels.gpu.problem import Layout

SCRATCH = 128 << 20
LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
EACH = 64  # bytes for a row and a block: a score, its order, and what finding the largest takes


def route(query: Tensor, means: Tensor, bias_means: Tensor | None, layout: Layout) -> Tensor:
    """As route.route, where bias_means are divided by scale."""
    batch, heads, queries, _ = query.shape
    group, of, topk = layout.group, layout.queries, layout.topk
    kv_heads = heads // group
    routes = query.new_full((batch, kv_heads, queries, group, topk), -1, dtype=torch.int32)
    n = min(layout.n, means.shape[2])
    means, block = means[:, :, :n], torch.arange(n, device=query.device)
    step = max(1, SCRATCH // (EACH * max(1, batch * heads * n)))
    for begin in range(0, queries, step):
        here = slice(begin, begin + step)
        rows = query[:, :, here]
        if of.index is not None:
            index = of.index[:, None, here, None].long()
            rows = query.gather(2, index.expand(-1, heads, -1, query.shape[3]))
        rows = rows.unflatten(1, (kv_heads, group)).transpose(2, 3)  # [b, h, q, G, D]
        with exact_float32():
            score = rows.flatten(2, 3).float() @ means.mT
        score = score.unflatten(2, (-1, group))
        if bias_means is not None:
            bias = bias_means[:, :, None, :n].unflatten(1, (kv_heads, group)).transpose(2, 3)
            score = score + bias
        own, first, end = (x[:, None, here, None, None] for x in (of.own, of.first, of.end))
        sink = first + layout.sinks
        able = (own >= 0) & (block >= first) & (block < end) & (block != own)
        lowest = torch.finfo(torch.float32).min
        order = sortable(torch.where(score >= lowest, score, lowest)) | (n - 1 - block)
        order = order.masked_fill(block < sink, MOST).masked_fill(~able, LEAST)
        order, best = order.topk(min(topk - 1, n), dim=-1)
        best = best.masked_fill(order == LEAST, n).sort(-1).values
        part = routes[:, :, here]
        part[..., :1] = own
        part[..., 1 : 1 + best.shape[-1]] = best.masked_fill(best == n, -1)
    return routes.flatten(2, 3)
