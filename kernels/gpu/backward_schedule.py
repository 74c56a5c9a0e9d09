"""Which program of dK/dV sums which routes into which keys.

    block     its keys cut into tiles of N; its list of routes into parts of at most L
    item      a (block, part, tile): one program, which walks its part of the list in order
    begin     the first route of the part whose row sees a key of the tile (the list ascends)
    whole     the first whose row sees them all: from there on nothing is masked

A block that every row chose (the first one, say) has a list as long as the sequence, and a program
that walked it alone would outlast all others. Such a list is cut, and the sums of its parts go to a
scratch of `SPLIT` bytes, which another launch adds up in order. L is the shortest that fits there.
It depends on the routes alone, so the sums repeat bit for bit.

Everything stays on the device. Shape letters as in problem.py; W items, bh = b Hkv + h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moonfx.kernels.gpu.block_index import Index
from moonfx.kernels.gpu.problem import Layout

SPLIT = 64 << 20  # bytes
SHORT = 4096  # routes: a list of that length is not worth cutting

COLUMNS = ("block", "offset", "begin", "whole", "end", "place", "parts", "step")


class Plan(NamedTuple):
    """What the programs of dK/dV do.

    Args:
        items: int64 [W, COLUMNS], the longest lists first:
            block: bh * n + its number, -1 past the last item. offset: the tile's first key in it.
            begin, whole, end: places in Index.entries, begin <= whole <= end.
            place: of the sums in the scratch, in tiles; -1 if they are the result.
            parts, step: of the item that adds up its tile's sums, which lie at place + i * step;
            parts is 0 for the others.
        places: tiles in the scratch.
    """

    items: Tensor
    places: int


def plan(index: Index | None, layout: Layout, kv_heads: int, keys: int, tile_bytes: int) -> Plan:
    """The items of a call.

    Args:
        index: None where a batch row is one block, whose list is then all rows.
        keys: N, of a tile. tile_bytes: of a tile's sums.
    """
    last, blocks, n = layout.queries.last, layout.blocks, layout.n
    batch, queries = last.shape
    rows, length = queries * layout.group, _slots(layout)
    if index is None:
        bounds = torch.arange(batch * kv_heads + 1, device=last.device) * rows
    else:
        bounds = index.starts[:: index.chunks]
    first, routes = bounds[:-1], bounds.diff()
    start, size = (
        x.long()[:, None].expand(batch, kv_heads, n).flatten() for x in (blocks.start, blocks.size)
    )
    tiles = (size + keys - 1) // keys
    places = max(1, SPLIT // tile_bytes) if rows > SHORT else 0
    longest = _longest(routes, tiles, rows, places)
    parts = (routes + longest - 1) // longest

    count = parts * tiles
    ends = count.cumsum(0)
    per_head = min(n * (-(-layout.block // keys)), -(-length // keys) + n)
    item = torch.arange(batch * kv_heads * per_head + places, device=last.device)
    block = torch.searchsorted(ends, item, right=True).clamp(max=len(ends) - 1)
    there = item < ends[-1:]
    within, step = item - (ends - count)[block], tiles[block].clamp(min=1)
    part, offset = within // step, within % step * keys
    begin = first[block] + part * longest
    end = torch.minimum(begin + longest, bounds[1:][block])
    order = torch.where(there, end - begin, -1).sort(descending=True, stable=True).indices

    whole = begin
    if layout.causal:
        # The rows that see a part of a block are those whose own it is: all of them chose it.
        b = block // (kv_heads * n)
        sorted_last = last if blocks.token is None else last.sort(-1).values
        base = torch.arange(batch, device=last.device) * (length + 1)
        ascending = (sorted_last + base[:, None]).flatten()
        from_block = torch.stack([offset, torch.minimum(offset + keys, size[block]) - 1])
        before = torch.searchsorted(ascending, base[b] + start[block] + from_block)
        others = b * queries  # rows of other sequences; and all that see nothing, if they are there
        if index is not None:
            others = torch.searchsorted(ascending, base[b] + start[block])
        blind, partial = first[block] + (before - others) * layout.group
        begin = torch.minimum(torch.maximum(begin, blind), end)
        whole = torch.minimum(torch.maximum(begin, partial), end)

    cut = parts > 1
    kept = torch.where(cut, count, 0)
    place = torch.where(cut[block], (kept.cumsum(0) - kept)[block] + within, -1)
    leads = cut[block] & (part == 0)
    table = (
        torch.where(there, block, -1),
        *(offset, begin, whole, end, place),
        torch.where(leads, parts[block], 0),
        step,
    )
    return Plan(torch.stack(table, -1)[order], places)


def _longest(routes: Tensor, tiles: Tensor, rows: int, places: int) -> Tensor:
    """The shortest L, int64 [1], for which the parts of all lists that are cut fit the scratch."""
    longest = torch.full_like(routes[:1], SHORT if places else max(rows, 1))
    reach = SHORT
    while reach < rows:  # a list has no more routes than there are rows: then none is cut
        parts = (routes + longest - 1) // longest
        longest = longest << (torch.where(parts > 1, parts * tiles, 0).sum() > places).long()
        reach *= 2
    return longest


def _slots(layout: Layout) -> int:
    """Keys of a batch row, at least as many as any slot's number."""
    token = layout.blocks.token
    return layout.n * layout.block if token is None else token.shape[1]
