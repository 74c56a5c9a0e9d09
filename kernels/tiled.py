"""MoBA in torch operations, for any device: only the selected work, in memory linear in N.

    eq. 6   gate    s = q . mean(K block), float32, ties to the lower block
    eq. 4   routes  a (query row, block) pair per chosen block, sorted by block, cut into tiles
    eq. 2   tile    P = exp(scale Q K^T - lse),  O = P V        batched products over gathered tiles
            merge   O = sum_j exp(lse_j - lse) O_j              lse = log sum_j exp(lse_j)
            back    dS = P (dO V^T - delta + dlse)              delta = rowsum(dO O)

The own block is a route like any other, but causal, and its tiles stop at their last row's key.
Work goes in passes over batch rows, key/value heads and, when one head is too much, queries. A pass
holds at most about `Budget.partials` bytes of partial results (one per route) and, at a time,
`Budget.tiles` bytes of gathered tiles and scores, or one tile if that is larger (128 rows x block).
Beyond that there is a float32 gradient of the pass's keys and values, and copies of the inputs:
nothing is N x N or N x blocks x D.

A merge is a gather in the order of the slots, never a scatter. The one sum over tiles (dK, dV) is
an `index_add_`, which is in order on CPU and which torch replaces by a sorted sum on CUDA when
`torch.use_deterministic_algorithms(True)` is set: the backward is then bitwise repeatable.

Shape letters: B batch, Hq = Hkv * G heads, Nq queries, Nk keys, D head dim, Dv value dim, n blocks;
within a pass R rows (batch, key/value head, query, G), S segments (batch, key/value head, block).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # rows: enough to keep a product busy, few enough that half a tile is little waste


@dataclass(frozen=True)
class Budget:
    """Bytes of scratch memory. A CUDA device wants larger batches, to hide its launches."""

    partials: int
    tiles: int

    @classmethod
    def on(cls, device: torch.device) -> "Budget":
        return cls(256 << 20, 128 << 20) if device.type == "cuda" else cls(64 << 20, 4 << 20)


@dataclass(frozen=True)
class Tiles:
    """Routes of a pass, sorted by segment and cut into tiles of T rows; a tile has one segment.

    Args:
        rows: int64 [tiles, T], the query row; R where a tile is not full.
        segment: int64 [tiles], whose keys the tile reads.
        turn: int64 [tiles], the order in which tiles are worked off.
        extents: in that order, how many of its segment's keys a tile reads.
        place: int64 [R, slots], where a route's result lies among the tiles' rows; tiles * T
            (a row kept neutral) when the row does not use the slot.
        offset: int64 [R + 1], each row's own position in its block, for causal tiles; or None.
    """

    rows: Tensor
    segment: Tensor
    turn: Tensor
    extents: list[int]
    place: Tensor
    offset: Tensor | None

    @property
    def slots(self) -> int:
        """Results that the tiles have room for."""
        return self.rows.numel()

    def batches(self, width: int, bytes_: int) -> Iterator[tuple[Tensor, int]]:
        """Tiles that fit the budget together, and how many keys they read."""
        start = 0
        while start < len(self.extents):
            extent = self.extents[start]  # own tiles come longest first
            step = max(1, bytes_ // (4 * extent * (self.rows.shape[1] + width)))
            yield self.turn[start : start + step], extent
            start += step

    def hidden(self, chosen: Tensor, extent: int) -> Tensor | None:
        """True for the keys that come after a row's own position: bool [P, T, extent]."""
        if self.offset is None:
            return None
        keys = torch.arange(extent, device=chosen.device)
        return keys > self.offset[self.rows[chosen]].unsqueeze(-1)


class Problem:
    """One call's shapes and positions; `forward` and `backward` walk it in the same passes."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: int,
        topk: int,
        sinks: int,
        scale: float | None,
        key_mask: Tensor | None,
    ) -> None:
        self.batch, heads, self.queries, self.dim = query.shape
        self.kv_heads, self.length = key.shape[1], key.shape[2]
        self.group = heads // self.kv_heads
        self.width = self.dim + value.shape[3]
        self.scale = self.dim**-0.5 if scale is None else scale
        if self.length <= block * topk:  # dense: one causal block, no gate
            block, topk, sinks = max(self.length, 1), 1, 0
        self.block, self.topk, self.sinks = block, topk, sinks
        self.blocks = -(-self.length // block)
        self.query, self.key, self.value = query, key, value
        self.key_mask = key_mask
        self.budget = Budget.on(query.device)
        self.offset = self.length - self.queries
        if key_mask is None:
            position = torch.arange(self.offset, self.length, device=query.device)
            self.position = position.expand(self.batch, -1)
        else:
            self.rank = key_mask.long().cumsum(-1) - 1
            self.position = self.rank[:, self.offset :]
            # Real keys first, in their order: then a key's rank is its index.
            self.order = (~key_mask).long().sort(dim=-1, stable=True).indices

    def head_passes(self) -> Iterator[tuple[slice, slice]]:
        """Batch rows and key/value heads, as many at a time as the budget takes."""
        heads = max(1, self.budget.partials // (self.route_bytes * max(1, self.queries)))
        rows, heads = max(1, heads // self.kv_heads), min(heads, self.kv_heads)
        for first in range(0, self.batch, rows):
            for head in range(0, self.kv_heads, heads):
                yield slice(first, first + rows), slice(head, head + heads)

    def query_passes(self) -> Iterator[slice]:
        step = max(TILE, self.budget.partials // self.route_bytes)
        for first in range(0, self.queries, step):
            yield slice(first, min(first + step, self.queries))

    @property
    def route_bytes(self) -> int:
        """Partial results of one query and one key/value head: output (or dQ), twice for waste."""
        return 2 * 4 * self.width * self.group * self.topk

    def rows(self, tensor: Tensor) -> Tensor:
        """[B, Hq, Nq, ...] seen as [B, Hkv, Nq, G, ...]: a block's rows in causal order."""
        return tensor.unflatten(1, (self.kv_heads, self.group)).transpose(2, 3)

    def to_blocks(self, tensor: Tensor, rows: slice, heads: slice) -> Tensor:
        """Keys or values of a pass by block: [S, block, D], padding removed, zeros at the end."""
        part = tensor[rows, heads]
        if self.key_mask is not None:
            order = self.order[rows, None, :, None].expand(part.shape)
            count = self.key_mask[rows].sum(-1)[:, None, None, None]
            index = torch.arange(self.length, device=part.device)[:, None]
            # Whatever lies under padding, even NaN, must not reach a product.
            part = part.gather(2, order).masked_fill(index >= count, 0.0)
        part = F.pad(part, (0, 0, 0, self.blocks * self.block - self.length))
        return part.reshape(-1, self.block, part.shape[-1])

    def from_blocks(self, blocks: Tensor, shape: torch.Size, rows: slice) -> Tensor:
        """The inverse of `to_blocks` for a gradient: zero where a key is padding."""
        part = blocks.view(*shape[:2], self.blocks * self.block, shape[3])
        if self.key_mask is None:
            return part[:, :, : self.length]
        rank = self.rank[rows, None, :, None].clamp(min=0).expand(shape)
        return part.gather(2, rank).masked_fill(~self.key_mask[rows, None, :, None], 0.0)

    def plan(self, keys: Tensor, rows: slice, heads: slice, queries: slice) -> list[Tiles]:
        """The tiles of a pass: own blocks first, then the chosen earlier ones."""
        query = self.rows(self.query)[rows, heads, queries]
        batch, kv_heads, count, group, _ = query.shape
        position = self.position[rows, queries][:, None, :, None]
        position = position.expand(batch, kv_heads, count, group)
        own = position.div(self.block, rounding_mode="floor")
        base = torch.arange(batch * kv_heads, device=query.device) * self.blocks
        base = base.view(batch, kv_heads, 1, 1)
        segments = batch * kv_heads * self.blocks

        route = torch.where(position >= 0, base + own, segments)
        tiles = cut(route.reshape(-1, 1), segments, tile_rows(group * min(count, self.block)))
        offset = (position % self.block).reshape(-1)
        plans = [causal(tiles, F.pad(offset, (0, 1)))]

        if self.topk > 1:
            means = self.block_means(keys, batch, kv_heads)
            candidates = (self.offset + queries.stop - 1) // self.block
            chosen = self.choose(query, means, own, candidates)
            route = torch.where(chosen >= 0, base[..., None] + chosen, segments)
            # No larger than a segment's mean share, or most of a tile would be empty.
            size = tile_rows(-(-group * count * (self.topk - 1) // max(1, candidates)))
            rows_, segment, place = cut(route.flatten(0, 3), segments, size)
            turn = torch.arange(len(rows_), device=query.device)
            plans.append(Tiles(rows_, segment, turn, [self.block] * len(rows_), place, None))
        return plans

    def block_means(self, keys: Tensor, batch: int, kv_heads: int) -> Tensor:
        """float32 [batch, Hkv, n, D]. Right for full blocks, and no other is ever a candidate."""
        return keys.sum(1, dtype=torch.float32).div_(self.block).view(batch, kv_heads, -1, self.dim)

    def choose(self, query: Tensor, means: Tensor, own: Tensor, candidates: int) -> Tensor:
        """The earlier blocks of each row, best first: int64 [B, Hkv, Nq, G, topk - 1], -1 for none.

        Args:
            candidates: no row's own block has a higher index.
        """
        batch, heads, count, group, _ = query.shape
        slots = self.topk - 1
        chosen = own.new_full((batch, heads, count, group, slots), -1)
        slots = min(slots, candidates)
        if slots == 0:
            return chosen
        means = means[:, :, :candidates].transpose(-1, -2)
        index = torch.arange(candidates, device=query.device)
        first = torch.iinfo(torch.int64).max - index
        step = max(1, self.budget.tiles // (32 * batch * heads * group * candidates))
        for start in range(0, count, step):
            here = slice(start, start + step)
            with exact_float32():
                score = query[:, :, here].flatten(2, 3).float() @ means  # eq. 6
            score = score.unflatten(2, (-1, group))
            order = torch.where(index < self.sinks, first, sortable(score) - index)
            earlier = index < own[:, :, here, :, None]
            order = order.masked_fill(~earlier, torch.iinfo(torch.int64).min)
            best = order.topk(slots, dim=-1).indices
            # Fewer earlier blocks than slots: the query attends them all, the rest stays unused.
            best = best.masked_fill(best >= own[:, :, here, :, None], -1)
            chosen[:, :, here, :, :slots] = best
        return chosen


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    sinks: int,
    scale: float | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """MoBA (eq. 2) of q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], of any strides.

    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, stored by token, and lse, float32 [B, Hq, Nq].
        0 and -inf for a query that sees no real key.
    """
    problem = Problem(query, key, value, block, topk, sinks, scale, key_mask)
    out = empty_by_token(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    for rows, heads in problem.head_passes():
        keys = problem.to_blocks(key, rows, heads)
        values = problem.to_blocks(value, rows, heads)
        for queries in problem.query_passes():
            region = rows, heads, queries
            plans = problem.plan(keys, *region)
            table = with_last(problem.rows(query)[region], 1, 0.0)
            parts = [attend(tiles, table, keys, values, problem) for tiles in plans]
            result, total = merge(plans, parts)
            target = problem.rows(out)[region]
            target.copy_(result.view(target.shape))
            target = problem.rows(lse)[region]
            target.copy_(total.view(target.shape))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    topk: int,
    sinks: int,
    scale: float | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, whose out and lse it takes; the routes are found again, not saved.

    Args:
        grad_out: like out. grad_lse: like lse, or None for zero.
    Returns:
        Gradients of query, key and value, in their dtypes, stored by token.
    """
    problem = Problem(query, key, value, block, topk, sinks, scale, key_mask)
    grads = tuple(empty_by_token(tensor, tensor.shape[3]) for tensor in (query, key, value))
    grad_query, grad_key, grad_value = grads
    if grad_query.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    for rows, heads in problem.head_passes():
        keys = problem.to_blocks(key, rows, heads)
        values = problem.to_blocks(value, rows, heads)
        sums = [torch.zeros_like(blocks, dtype=torch.float32) for blocks in (keys, values)]
        for queries in problem.query_passes():
            region = rows, heads, queries
            plans = problem.plan(keys, *region)
            delta = problem.rows(grad_out)[region].float() * problem.rows(out)[region]
            delta = delta.sum(-1)
            if grad_lse is not None:
                delta = delta - problem.rows(grad_lse)[region]
            tables = (
                with_last(problem.rows(query)[region], 1, 0.0),
                with_last(problem.rows(grad_out)[region], 1, 0.0),
                with_last(problem.rows(lse)[region], 0, torch.inf),  # P = 0 where a tile is empty
                with_last(delta, 0, 0.0),
            )
            target = problem.rows(grad_query)[region]
            total = torch.zeros(target.shape, device=target.device).flatten(0, 3)
            for tiles in plans:
                part = attend_backward(tiles, tables, keys, values, sums, problem)
                for place in tiles.place.unbind(-1):
                    total += part[place]
            target.copy_(total.view(target.shape))
        for grad, blocks in zip(grads[1:], sums, strict=True):
            target = grad[rows, heads]
            target.copy_(problem.from_blocks(blocks, target.shape, rows))
    return grad_query, grad_key, grad_value


def attend(
    tiles: Tiles, table: Tensor, keys: Tensor, values: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Each route's own softmax: float32 output [slots + 1, Dv] and lse [slots + 1]."""
    size = tiles.rows.shape[1]
    out = torch.empty(tiles.slots + 1, values.shape[-1], device=values.device)
    lse = torch.empty(tiles.slots + 1, device=values.device)
    out[-1], lse[-1] = 0.0, -torch.inf
    for chosen, extent in tiles.batches(problem.width, problem.budget.tiles):
        segment = tiles.segment[chosen]
        score = product(table[tiles.rows[chosen]], keys[:, :extent][segment].mT).mul_(problem.scale)
        hidden = tiles.hidden(chosen, extent)
        if hidden is not None:
            score.masked_fill_(hidden, -torch.inf)
        top = score.amax(-1, keepdim=True)
        probability = score.sub_(top).exp_()
        total = probability.sum(-1, keepdim=True)
        result = product(probability, values[:, :extent][segment]).div_(total)
        out[:-1].unflatten(0, (-1, size))[chosen] = result
        lse[:-1].unflatten(0, (-1, size))[chosen] = (top + total.log()).squeeze(-1)
    return out, lse


def merge(plans: list[Tiles], parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over all of a row's routes: float32 [R, Dv] and [R], in the slots' order."""
    lses = torch.cat([part[1][tiles.place] for tiles, part in zip(plans, parts, strict=True)], -1)
    lse = lses.logsumexp(-1)
    weight = (lses - lse.masked_fill(lse.isneginf(), 0.0)[:, None]).exp()
    out = torch.zeros(len(lse), parts[0][0].shape[-1], device=lse.device)
    slot = 0
    for tiles, (result, _) in zip(plans, parts, strict=True):
        for place in tiles.place.unbind(-1):
            out.addcmul_(result[place], weight[:, slot, None])
            slot += 1
    return out, lse


def attend_backward(
    tiles: Tiles,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    sums: list[Tensor],
    problem: Problem,
) -> Tensor:
    """Adds to dK and dV in `sums`; returns each route's dQ, float32 [slots + 1, D]."""
    size = tiles.rows.shape[1]
    grad_query = torch.empty(tiles.slots + 1, keys.shape[-1], device=keys.device)
    grad_query[-1] = 0.0
    for chosen, extent in tiles.batches(2 * problem.width, problem.budget.tiles // 2):
        segment = tiles.segment[chosen]
        key, value = keys[:, :extent][segment], values[:, :extent][segment]
        query, grad_out, lse, delta = (table[tiles.rows[chosen]] for table in tables)
        probability = product(query, key.mT).mul_(problem.scale).sub_(lse[..., None]).exp_()
        hidden = tiles.hidden(chosen, extent)
        if hidden is not None:
            probability.masked_fill_(hidden, 0.0)
        sums[1][:, :extent].index_add_(0, segment, product(probability.mT, grad_out))
        grad_score = product(grad_out, value.mT).sub_(delta[..., None]).mul_(probability)
        grad_score.mul_(problem.scale)
        sums[0][:, :extent].index_add_(0, segment, product(grad_score.mT, query))
        grad_query[:-1].unflatten(0, (-1, size))[chosen] = product(grad_score, key)
    return grad_query


def cut(route: Tensor, segments: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts routes by segment and cuts each segment's into tiles of `size` rows.

    Args:
        route: int64 [R, slots], the segment each row attends in each slot; `segments` for none.
    Returns:
        rows, segment and place, as in `Tiles`.
    """
    count, slots = route.shape
    ordered, order = route.reshape(-1).sort(stable=True)
    index = torch.arange(segments + 1, device=route.device)
    start = torch.searchsorted(ordered, index)
    tiles = (start.diff() + size - 1) // size
    first = F.pad(tiles.cumsum(0), (1, 0))
    total = int(first[-1])  # the number of tiles depends on the data: the host has to wait for it
    segment = index[:-1].repeat_interleave(tiles, output_size=total)
    tile = torch.arange(total, device=route.device)
    source = (start[segment] + (tile - first[segment]) * size)[:, None]
    source = source + torch.arange(size, device=route.device)
    full = source < start[segment + 1][:, None]
    rows = order[source.clamp(max=len(order) - 1)].div(slots, rounding_mode="floor")
    slot = torch.arange(len(ordered), device=route.device) - start[ordered] + first[ordered] * size
    place = torch.empty_like(slot)
    place[order] = slot.masked_fill(ordered == segments, total * size)
    return rows.masked_fill(~full, count), segment, place.view(count, slots)


def causal(tiles: tuple[Tensor, Tensor, Tensor], offset: Tensor) -> Tiles:
    """Tiles of own blocks, longest first, each with only the keys that its last row sees."""
    rows, segment, place = tiles
    extent, turn = (offset[rows].amax(-1) + 1).sort(descending=True, stable=True)
    return Tiles(rows, segment, turn, extent.tolist(), place, offset)


def tile_rows(rows: int) -> int:
    """A power of two: TILE, or less where a segment cannot fill that many."""
    return min(TILE, 1 << max(0, rows - 1).bit_length())


def sortable(score: Tensor) -> Tensor:
    """float32 -> int64 in the same order, unequal ones 2**32 apart: room to break a tie."""
    bits = (score + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32


def product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in float32, from operands in right's dtype where the device does that."""
    if right.dtype != torch.float32 and right.is_cuda and torch.version.hip is None:
        return torch.bmm(left.to(right.dtype), right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products without TF32 or bfloat16 inside: a rounded gate would flip near-ties."""
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = torch.backends.cuda.matmul, mkldnn
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def with_last(rows: Tensor, dims: int, last: float) -> Tensor:
    """A pass's rows as a table [R + 1, ...] whose last row stands for "no row"."""
    flat = rows.reshape(-1, *rows.shape[rows.dim() - dims :])
    return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), last)])


def empty_by_token(like: Tensor, width: int) -> Tensor:
    """[B, H, N, width] over storage [B, N, H, width]: a model's reshape to tokens is then free."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)
