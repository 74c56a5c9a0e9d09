"""Where each token lies: among the real tokens of its own sequence, and in which block.

    tokens   a1 b1 .. a2 b2 a3 b3      (.. is padding; blocks of two)
    sorted   a1 a2 a3 b1 b2 b3 ..      by sequence, in their order, a sequence's padding last
    blocks   [a1 a2] [a3] [b1 b2] [b3]

A row without `segments` is one sequence. A sequence's blocks are consecutive in its row, a block is
a run of sorted places, and no sequence, however short, takes more room than it has tokens.

Shape letters: B batch, Nk keys, n blocks in a row (in the row that has most).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Of each token (or sorted place), int64 [B, Nk].

    Args:
        rank: real tokens of its sequence at or before it, less one.
        count: real tokens of its sequence.
        start: the sorted place of its sequence's first token.
    """

    rank: Tensor
    count: Tensor
    start: Tensor

    def at(self, index: Tensor) -> "Tokens":
        return Tokens(*(x.gather(1, index) for x in (self.rank, self.count, self.start)))


@dataclass(frozen=True)
class SequenceBlocks:
    """Of each block of a row, int64 [B, n]; past a row's last block, `size` is 0.

    Args:
        start: the sorted place of its first key. size: its real keys.
        first: its sequence's first block. count: real tokens of its sequence.
    """

    start: Tensor
    size: Tensor
    first: Tensor
    count: Tensor


class Sequences:
    """The tokens of a call, and its sorted order: `order` and `place` are None if it is theirs."""

    def __init__(
        self,
        batch: int,
        length: int,
        key_mask: Tensor | None,
        segments: Tensor | None,
        device: torch.device,
    ) -> None:
        self.real, self.packed = key_mask, segments is not None
        self.order = self.place = None
        index = torch.arange(length, device=device).expand(batch, length)
        if key_mask is None and segments is None:
            lengths = torch.full_like(index, length)
            self.tokens = self.sorted = Tokens(index, lengths, torch.zeros_like(index))
            return
        real = torch.ones_like(index) if key_mask is None else key_mask.long()
        if segments is None:
            segments = torch.zeros_like(index)
        ids, by_id = segments.long().sort(dim=-1, stable=True)
        back = by_id.argsort(-1)
        real = real.gather(1, by_id)
        changes = ids.diff(dim=-1) != 0
        edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
        opens, closes = torch.cat([edge, changes], -1), torch.cat([changes, edge], -1)
        start = torch.where(opens, index, 0).cummax(-1).values
        end = torch.where(closes, index, length).flip(-1).cummin(-1).values.flip(-1)
        seen = real.cumsum(-1)
        before = (seen - real).gather(1, start)
        rank, count = seen - before - 1, seen.gather(1, end) - before
        self.sorted = Tokens(rank, count, start)
        self.tokens = self.sorted.at(back)
        place = torch.where(real > 0, start + rank, index + count - rank - 1)  # padding goes last
        self.place = place.gather(1, back)
        self.order = self.place.argsort(-1)

    def longest(self) -> int:
        """No sequence has more real tokens."""
        if not self.packed:
            return self.sorted.count.shape[1]
        return int(self.sorted.count.max())

    def blocks(self, block: int) -> tuple[SequenceBlocks, Tensor]:
        """The blocks, and int64 [B, Nk]: the first block of each token's sequence."""
        count, start = self.sorted.count, self.sorted.start
        length = count.shape[1]
        offset = torch.arange(length, device=count.device) - start
        opens = (offset % block == 0) & (offset < count)
        number = opens.cumsum(-1) - 1
        total = opens.sum(-1, keepdim=True)
        blocks = int(total.max()) if self.packed else -(-length // block)
        here = (~opens).long().sort(dim=-1, stable=True).indices[:, :blocks]
        size = (count - offset).gather(1, here).clamp(max=block)
        exists = torch.arange(blocks, device=count.device) < total
        first = number.gather(1, start)
        table = SequenceBlocks(
            here, size.where(exists, 0), first.gather(1, here), count.gather(1, here)
        )
        return table, number.gather(1, self.tokens.start)

    def sort(self, tensor: Tensor, rows: slice) -> Tensor:
        """[b, H, Nk, X] of the batch rows `rows` as [b * H * Nk, X]: sorted, padding zeroed."""
        if self.order is not None:
            tensor = tensor.gather(2, self.order[rows, None, :, None].expand(tensor.shape))
        if self.real is not None:
            # Whatever lies under padding, even NaN, must not reach a product.
            assert self.order is not None
            padding = ~self.real[rows].gather(1, self.order[rows])
            tensor = tensor.masked_fill(padding[:, None, :, None], 0.0)
        return tensor.reshape(-1, tensor.shape[-1])

    def unsort(self, flat: Tensor, shape: torch.Size, rows: slice) -> Tensor:
        """The inverse of `sort` for a gradient: zero where a key is padding."""
        tensor = flat.view(shape)
        if self.place is not None:
            tensor = tensor.gather(2, self.place[rows, None, :, None].expand(shape))
        if self.real is not None:
            tensor = tensor.masked_fill(~self.real[rows, None, :, None], 0.0)
        return tensor
