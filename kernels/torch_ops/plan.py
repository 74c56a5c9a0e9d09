"""Which tiles a pass of moba.py works off: the gate, the routes, their sorting by block.

    eq. 6   s = q . mean(K block) + mean(bias) / scale    float32, ties to the lower block
    eq. 5   own block; then sinks and the best others, topk in all
    eq. 4   a route (row, block) per chosen block, sorted by block, cut into tiles of T rows

Only sequences of more than topk blocks need the gate: the others are attended whole.

Shape letters as in moba.py; n blocks in a batch row, C of them candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.exact import exact_float32, sortable
from moonfx.kernels.torch_ops.problem import QueryPass

TILE = 128  # rows: enough to keep a product busy, few enough that half a tile is little waste


@dataclass(frozen=True)
class TilePlan:
    """Routes of a pass, sorted by block and cut into tiles of T rows; a tile has one block.

    Args:
        rows: int64 [tiles, T], the query row; R where a tile is not full.
        start: int64 [tiles], the first sorted key of the tile's block.
        turn: int64 [tiles], the order in which tiles are worked off.
        extents: in that order, how many keys a tile reads.
        place: int64 [R, slots], where a route's result lies among the tiles' rows; tiles * T
            (a row kept neutral) when the row does not use the slot.
        seen: int64 [tiles, T or 1], how many of the block's keys a row sees; None if all.
    """

    rows: Tensor
    start: Tensor
    turn: Tensor
    extents: list[int]
    place: Tensor
    seen: Tensor | None

    @property
    def slots(self) -> int:
        """Results that the tiles have room for."""
        return self.rows.numel()

    def batches(self, width: int, bytes_: int) -> Iterator[tuple[Tensor, int]]:
        """Tiles that fit the budget together, and how many keys they read."""
        start = 0
        while start < len(self.extents):
            extent = self.extents[start]  # the longest come first
            step = max(1, bytes_ // (4 * extent * (self.rows.shape[1] + width)))
            yield self.turn[start : start + step], extent
            start += step

    def keys(self, chosen: Tensor, extent: int, total: int) -> Tensor:
        """The sorted keys that tiles read: int64 [P, extent]; past the last one, the last."""
        index = torch.arange(extent, device=chosen.device)
        return (self.start[chosen][:, None] + index).clamp_(max=total - 1)

    def hidden(self, chosen: Tensor, extent: int) -> Tensor | None:
        """True for the keys that a row does not see: bool [P, T or 1, extent]."""
        if self.seen is None:
            return None
        index = torch.arange(extent, device=chosen.device)
        return index >= self.seen[chosen][..., None]


def plan(work: QueryPass, keys: Tensor, biases: Tensor | None) -> list[TilePlan]:
    """The tiles of a pass: own blocks first, then the other chosen ones.

    Args:
        keys: [b * h * Nk, D], the pass's keys, sorted. biases: float32 [b * h * Nk, G] or None.
    """
    problem = work.problem
    start = work.by_head(problem.blocks.start, problem.length)
    size = work.by_head(problem.blocks.size)
    base = work.bases(problem.n).view(work.batch, work.heads, 1, 1)
    sees = work.rank >= 0 if problem.causal else work.count > 0
    route = torch.where(work.by_row(sees), base + work.by_row(work.first + work.own), len(start))
    rows, block, place = cut(route.reshape(-1, 1), len(start))
    if problem.causal:
        seen = work.by_row(work.rank - work.own * problem.block + 1).reshape(-1)
        seen = F.pad(seen, (0, 1), value=1)[rows]
    else:
        seen = size[block][:, None]
    plans = [longest_first(rows, start[block], place, seen)]

    if problem.topk > 1:
        chosen = choose_blocks(work, keys, biases)
        route = torch.where(chosen >= 0, base[..., None] + chosen, len(start))
        rows, block, place = cut(route.flatten(0, 3), len(start))
        if problem.causal:  # an earlier block is full
            turn = torch.arange(len(rows), device=rows.device)
            extents = [problem.block] * len(rows)
            plans.append(TilePlan(rows, start[block], turn, extents, place, None))
        else:
            plans.append(longest_first(rows, start[block], place, size[block][:, None]))
    return plans


def longest_first(rows: Tensor, start: Tensor, place: Tensor, seen: Tensor) -> TilePlan:
    """Tiles that each read only the keys that one of its rows sees."""
    extent, turn = seen.amax(-1).sort(descending=True, stable=True)
    return TilePlan(rows, start, turn, extent.tolist(), place, seen)


def choose_blocks(work: QueryPass, keys: Tensor, biases: Tensor | None) -> Tensor:
    """The other blocks of each row, by their place in the batch row's, -1 for none.

    A sequence of at most topk blocks is attended whole; for the others the gate chooses.

    Returns:
        int64 [b, h, q, G, topk - 1].
    """
    problem = work.problem
    own, first, last = (x[..., None] for x in (work.own, work.first, work.last))
    other = torch.arange(problem.topk - 1, device=keys.device)
    other = other + (other >= own)  # [b, q, topk - 1]
    every = work.by_row(torch.where(other <= last, first + other, -1))
    block = work.candidates
    slots = min(problem.topk - 1, block.shape[1])
    if slots == 0:
        return every
    is_dense = work.by_row(work.count <= problem.block * problem.topk)
    chosen = every.contiguous()
    means, bias = candidate_means(work, keys, biases)
    first_of = problem.blocks.first[work.rows].gather(1, block)
    local = (block - first_of)[:, None]  # [b, 1, C], the block's place in its sequence
    tie = torch.arange(block.shape[1], device=keys.device)
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    step = max(1, problem.budget.tiles // (32 * is_dense[:, :, :1].numel() * block.shape[1]))
    for begin in range(0, work.queries, step):
        here = slice(begin, begin + step)
        with exact_float32():
            score = work.query[:, :, here].flatten(2, 3).float() @ means.mT  # eq. 6
        score = score.unflatten(2, (-1, problem.group))
        if bias is not None:
            score += bias.mT[:, :, None]
        able = (first_of[:, None] == first[:, here]) & (local != own[:, here])
        able &= local <= last[:, here]  # [b, q, C]
        order = torch.where(work.by_row(local < problem.sinks), most - tie, sortable(score) - tie)
        order, places = order.masked_fill(~work.by_row(able), least).topk(slots, dim=-1)
        found = block[:, None, None, None].expand(*places.shape[:-1], -1).gather(-1, places)
        # Fewer candidates than slots: the query attends them all, the rest stays unused.
        found = found.masked_fill(order == least, -1)
        found = F.pad(found, (0, problem.topk - 1 - slots), value=-1)
        chosen[:, :, here] = chosen[:, :, here].where(is_dense[:, :, here, :, None], found)
    return chosen


def candidate_means(
    work: QueryPass, keys: Tensor, biases: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Mean keys of the candidates, float32 [b, h, C, D], and mean biases over scale, [.., C, G]."""
    problem = work.problem
    shape = work.batch, work.heads, work.candidates.shape[1], -1
    block = problem.candidates[:, : shape[2]]
    start = work.by_head(problem.blocks.start.gather(1, block), problem.length)[:, None]
    size = work.by_head(problem.blocks.size.gather(1, block))[:, None]
    index = torch.arange(problem.block, device=keys.device)
    step = max(1, problem.budget.tiles // (4 * problem.block * problem.width))

    def means(table: Tensor) -> Tensor:
        parts = []
        for begin in range(0, len(start), step):
            here = slice(begin, begin + step)
            part = table[(start[here] + index).clamp_(max=len(table) - 1)].float()
            part.masked_fill_((index >= size[here])[..., None], 0.0)
            parts.append(part.sum(1).div_(size[here].clamp(min=1)))
        return torch.cat(parts).view(shape)

    bias = None if biases is None else means(biases).div_(problem.scale)
    if problem.means is None:
        return means(keys), bias
    # Given ones lie by block number: so do the candidates, there being no segments.
    return problem.means[work.rows, work.kv_heads, : shape[2]].float(), bias


def cut(route: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts routes by block and cuts each block's into tiles of T rows.

    Args:
        route: int64 [R, slots], the block that each row attends in each slot; `blocks` for none.
    Returns:
        rows and place, as in `TilePlan`, and int64 [tiles], each tile's block.
    """
    count, slots = route.shape
    ordered, order = route.reshape(-1).sort(stable=True)
    index = torch.arange(blocks + 1, device=route.device)
    start = torch.searchsorted(ordered, index)
    share = start.diff()
    # No larger than a block's mean share, or most of a tile would be empty.
    routes, used = torch.stack([start[-1], (share > 0).sum()]).tolist()
    size = tile_rows(-(-routes // max(1, used)))
    tiles = (share + size - 1) // size
    first = F.pad(tiles.cumsum(0), (1, 0))
    total = int(first[-1])  # the number of tiles depends on the data: the host has to wait for it
    block = index[:-1].repeat_interleave(tiles, output_size=total)
    tile = torch.arange(total, device=route.device)
    source = (start[block] + (tile - first[block]) * size)[:, None]
    source = source + torch.arange(size, device=route.device)
    full = source < start[block + 1][:, None]
    rows = order[source.clamp(max=len(order) - 1)].div(slots, rounding_mode="floor")
    slot = torch.arange(len(ordered), device=route.device) - start[ordered] + first[ordered] * size
    place = torch.empty_like(slot)
    place[order] = slot.masked_fill(ordered == blocks, total * size)
    return rows.masked_fill(~full, count), block, place.view(count, slots)


def tile_rows(rows: int) -> int:
    """A power of two: TILE, or less where a block cannot fill that many."""
    return min(TILE, 1 << max(0, rows - 1).bit_length())
