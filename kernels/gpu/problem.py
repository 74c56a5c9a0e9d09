"""Where the rows and blocks of a call lie: what a GPU kernel reads in place of masks, segments.

    slot    a place in the sorted keys of a batch row: a sequence's real tokens are adjacent
    block   a run of at most `block` slots of one sequence; numbered within the batch row
    row     a query of one kv head: row r * G + g is the g-th query head of the kv head, at the
            r-th place of the sorted queries; so the G heads of a group are adjacent

Everything is computed on the device, in tensors whose sizes follow from shapes: no host waits.

Shape letters: B batch, Hq = Hkv * G heads, Nq queries, Nk keys, n block numbers in a batch row,
R = Nq * G rows of a kv head, K routes of a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.sequences import Sequences

# Kernel arguments that follow a sequence's length without being one: strides of the tensors below,
# and of a bias. A kernel that Triton specialised for them would be compiled for each new length.
STRIDES = [
    *("last_row", "own_row", "first_row", "end_row", "order_row", "index_row"),
    *("block_row", "start_row", "size_row", "token_row", "bias_row", "bias_head"),
]


@dataclass(frozen=True)
class Queries:
    """Of each place r in the sorted queries, int32 [B, Nq] (the batch stride may be 0).

    Queries are sorted by sequence, in their order: `last` never falls within a sequence.

    Args:
        last: the last slot that it sees, -1 for none.
        own: the number of its own block, -1 if it sees nothing.
        first, end: the blocks first .. end - 1 are its candidates, `own` and its sinks among them
            or not: causal has end = own, bidirectional the end of its sequence.
        index: the query at this place; None where place r is query r.
    """

    last: Tensor
    own: Tensor
    first: Tensor
    end: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class Blocks:
    """Of each block number, int32 [B, n] (the batch stride may be 0).

    Args:
        start: its first slot. size: its real keys, 0 for a number that is not used.
        token: int32 [B, Nk], the key at each slot; None where slot s is key s.
    """

    start: Tensor
    size: Tensor
    token: Tensor | None = None


class Layout(NamedTuple):
    """A call's sorted order. block, topk and sinks are those that run: one block where it is dense.

    Args:
        n: block numbers in a batch row, used or not. group: query heads of a kv head.
    """

    queries: Queries
    blocks: Blocks
    block: int
    topk: int
    sinks: int
    n: int
    group: int
    causal: bool


def layout(query: Tensor, key: Tensor, arguments: MobaArguments) -> Layout:
    """Where the rows and blocks of a call lie.

    Args:
        query: [B, Hq, Nq, D]. key: [B, Hkv, Nk, D]. Only their shapes and device are read.
    """
    length, heads = key.shape[2], key.shape[1]
    block, topk, sinks = arguments.block, arguments.topk, arguments.sinks
    if length <= block * topk:  # every sequence is one block
        block, topk, sinks = max(length, 1), 1, 0
    if arguments.segments is not None:
        queries, blocks = packed(query, key, arguments, block)
    elif arguments.key_mask is not None:
        queries, blocks = padded(query, arguments.key_mask, arguments.causal, block)
    else:
        queries, blocks = plain(query, length, arguments.causal, block)
    n, group = blocks.size.shape[1], query.shape[1] // max(heads, 1)
    return Layout(queries, blocks, block, topk, sinks, n, group, arguments.causal)


def plain(query: Tensor, length: int, causal: bool, block: int) -> tuple[Queries, Blocks]:
    """Of rows that are one sequence without padding: the same in every batch row."""
    batch, count, device = query.shape[0], query.shape[2], query.device
    place = torch.arange(length - count, length, dtype=torch.int32, device=device)
    start = torch.arange(0, length, block, dtype=torch.int32, device=device)
    own = place // block
    queries = (
        place if causal else torch.full_like(place, length - 1),
        own,
        torch.zeros_like(own),
        own if causal else torch.full_like(own, len(start)),
    )
    size = (length - start).clamp(max=block)
    return (
        Queries(*(x.expand(batch, -1) for x in queries)),
        Blocks(start.expand(batch, -1), size.expand(batch, -1)),
    )


def padded(query: Tensor, real: Tensor, causal: bool, block: int) -> tuple[Queries, Blocks]:
    """Of rows that are one sequence each: a slot is a rank among real keys, padding comes last."""
    length = real.shape[1]
    index = torch.arange(length, device=real.device)
    seen = real.cumsum(-1)
    count = seen[:, -1:]
    token = torch.where(real, seen - 1, count + index - seen).argsort(-1)
    rank = seen[:, length - query.shape[2] :] - 1
    zero = torch.zeros_like(rank)
    queries = seen_from(rank, count.expand_as(rank), zero, zero, causal, block)
    start = torch.arange(0, length, block, device=real.device).expand(len(real), -1)
    size = (count - start).clamp(0, block)
    return Queries(*narrow(*queries)), Blocks(*narrow(start, size, token))


def packed(
    query: Tensor, key: Tensor, arguments: MobaArguments, block: int
) -> tuple[Queries, Blocks]:
    """Of rows of packed sequences: a row has as many block numbers as tokens, most not used."""
    assert arguments.segments is not None
    batch, length, device = len(key), key.shape[2], key.device
    places = Sequences(batch, length, arguments.key_mask, arguments.segments, device)
    offset = torch.arange(length, device=device) - places.sorted.start
    opens = (offset % block == 0) & (offset < places.sorted.count)
    total = opens.cumsum(-1)

    here = slice(length - query.shape[2], length)
    index = arguments.segments[:, here].sort(dim=-1, stable=True).indices
    tokens = [x[:, here] for x in (places.tokens.rank, places.tokens.count, places.tokens.start)]
    rank, count, start = (x.gather(1, index) for x in tokens)
    # A sequence of padding alone opens no block: its queries see nothing, whatever `first` says.
    first = (total.gather(1, start) - 1).clamp(min=0)
    queries = seen_from(rank, count, start, first, arguments.causal, block)

    number = torch.arange(length, device=device).expand(batch, -1)
    start = torch.searchsorted(total, number + 1).clamp(max=max(length - 1, 0))  # of each block
    size = (places.sorted.count - offset).gather(1, start).clamp(max=block)
    size = size.where(number < total[:, -1:], 0)
    assert places.order is not None
    return Queries(*narrow(*queries, index)), Blocks(*narrow(start, size, places.order))


def seen_from(
    rank: Tensor, count: Tensor, start: Tensor, first: Tensor, causal: bool, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`last`, `own`, `first` and `end` of queries, from where they stand in their sequences.

    Args:
        rank: real keys of its sequence at or before it, less one. count: real keys of it.
        start: the sequence's first slot. first: its first block.
    """
    seen = rank if causal else count - 1
    nothing = seen < 0
    last = (start + seen).masked_fill(nothing, -1)
    own = (first + rank.clamp(min=0) // block).masked_fill(nothing, -1)
    return last, own, first, own if causal else first + (count + block - 1) // block


def narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    """int32 and contiguous."""
    return tuple(x.int().contiguous() for x in tensors)
