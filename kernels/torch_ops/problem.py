"""A call of moba.py, and the passes that it is done in.

    all rows  =  passes over batch rows and key/value heads  x  passes over queries

Shape letters as in moba.py; a pass has b batch rows, h key/value heads and q queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.sequences import Sequences

QUERIES = 128  # in a pass at least


@dataclass(frozen=True)
class Budget:
    """Bytes of scratch memory. A CUDA device wants larger batches, to hide its launches."""

    partials: int
    tiles: int

    @classmethod
    def on(cls, device: torch.device) -> "Budget":
        return cls(256 << 20, 128 << 20) if device.type == "cuda" else cls(64 << 20, 4 << 20)


class Problem:
    """One call's shapes and positions; `forward` and `backward` walk it in the same passes."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments) -> None:
        self.batch, heads, self.queries, self.dim = query.shape
        self.kv_heads, self.length = key.shape[1], key.shape[2]
        self.group = heads // self.kv_heads
        self.width = self.dim + value.shape[3]
        self.scale = arguments.scale_for(self.dim)
        self.causal, self.softcap = arguments.causal, arguments.softcap
        self.query, self.offset = query, self.length - self.queries
        self.budget = Budget.on(query.device)
        self.means = arguments.block_means
        self.bias = arguments.key_bias
        if self.bias is not None:  # seen as [B, Hkv, Nk, G]
            self.bias = self.by_kv_head(self.bias.expand(self.batch, heads, -1))
        self.sequences = Sequences(
            self.batch, self.length, arguments.key_mask, arguments.segments, query.device
        )
        block, topk, sinks = arguments.block, arguments.topk, arguments.sinks
        longest = self.sequences.longest() if query.numel() else 0
        if longest <= block * topk:  # dense: a block per sequence, no gate
            block, topk, sinks = max(longest, 1), 1, 0
        self.block, self.topk, self.sinks = block, topk, sinks

        self.blocks, self.first = self.sequences.blocks(block)
        self.n = self.blocks.start.shape[1]
        self.candidates = self.gated()

    def gated(self) -> Tensor:
        """The blocks of sequences with more than topk blocks: int64 [B, C], padded with others."""
        if not self.sequences.packed:
            return torch.arange(self.n, device=self.query.device).expand(self.batch, -1)
        blocks = self.blocks
        long = (blocks.size > 0) & (blocks.count > self.block * self.topk)
        most = int(long.sum(-1).max())
        return (~long).long().sort(dim=-1, stable=True).indices[:, :most]

    def by_kv_head(self, tensor: Tensor) -> Tensor:
        """[B, Hq, N, ...] seen as [B, Hkv, N, G, ...]: the rows of a block in causal order."""
        return tensor.unflatten(1, (self.kv_heads, self.group)).transpose(2, 3)

    def sorted(
        self, key: Tensor, value: Tensor, rows: slice, heads: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A pass's keys [b * h * Nk, D], values [.., Dv] and biases [.., G], by sequence."""
        sort = self.sequences.sort
        bias = None if self.bias is None else sort(self.bias[rows, heads], rows)
        return sort(key[rows, heads], rows), sort(value[rows, heads], rows), bias

    def head_passes(self) -> Iterator[tuple[slice, slice]]:
        """Batch rows and key/value heads, as many at a time as the budget takes."""
        heads = max(1, self.budget.partials // (self.route_bytes * max(1, self.queries)))
        rows, heads = max(1, heads // self.kv_heads), min(heads, self.kv_heads)
        for first in range(0, self.batch, rows):
            for head in range(0, self.kv_heads, heads):
                yield slice(first, first + rows), slice(head, head + heads)

    def query_passes(self) -> Iterator[slice]:
        step = max(QUERIES, self.budget.partials // self.route_bytes)
        for first in range(0, self.queries, step):
            yield slice(first, min(first + step, self.queries))

    @property
    def route_bytes(self) -> int:
        """Partial results of one query and one key/value head: output (or dQ), twice for waste."""
        return 2 * 4 * self.width * self.group * self.topk


class QueryPass:
    """Some batch rows, key/value heads and queries of a problem, and where those queries stand.

    Args:
        region: the three slices.
    Attributes, int64 [b, q]:
        rank, count: as in `Tokens`. first: the first block of the query's sequence.
        own, last: the query's block and the last one that it may attend, counted in its sequence.
    """

    def __init__(self, problem: Problem, region: tuple[slice, slice, slice]) -> None:
        self.problem = problem
        self.query = problem.by_kv_head(problem.query)[region]
        self.batch, self.heads, self.queries = self.query.shape[:3]
        self.rows, self.kv_heads, queries = region
        here = slice(problem.offset + queries.start, problem.offset + queries.stop)
        tokens = problem.sequences.tokens
        self.rank, self.count = tokens.rank[self.rows, here], tokens.count[self.rows, here]
        self.first = problem.first[self.rows, here]
        self.own = self.rank.clamp(min=0) // problem.block
        self.last = self.own if problem.causal else (self.count - 1) // problem.block
        self.candidates = problem.candidates[self.rows]
        if problem.causal and not problem.sequences.packed:
            # No query's own block has a higher index, and it chooses among earlier ones.
            self.candidates = self.candidates[:, : (here.stop - 1) // problem.block]

    def by_row(self, tensor: Tensor) -> Tensor:
        """[b, q, ...] seen as [b, h, q, G, ...]."""
        size = self.batch, self.heads, tensor.shape[1], self.problem.group, *tensor.shape[2:]
        return tensor[:, None, :, None].expand(size)

    def by_head(self, tensor: Tensor, step: int = 0) -> Tensor:
        """[B, n] of all batch rows as [b * h * n] of the pass, `step` more from head to head."""
        part = tensor[self.rows, None].expand(-1, self.heads, -1).flatten(0, 1)
        return (part + self.bases(step)[:, None]).flatten()

    def bases(self, step: int) -> Tensor:
        """The first of each head's `step` places: int64 [b * h]."""
        return torch.arange(self.batch * self.heads, device=self.query.device) * step
