"""What a case costs before anything runs: routes, tiles, bytes; nothing here knows a machine.

Which earlier blocks a query chooses is taken as chance, every one as likely as another, so that a
count is an expectation. It is exact for the own block, the sinks, and what is attended in all.

Shape letters: n blocks, G query heads of a kv head, R = G * queries rows of a kv head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moonfx.bench.attention.cases import Case
from moonfx.bench.harness.arguments import DTYPES

# Bytes: partial results and their indices, which the GPU kernels keep below a budget.
SCRATCH = 512 << 20


class BlockCounts(NamedTuple):
    """By block, float64 [n]: rows of a kv head that attend it, the part of them whose own block it
    is, and how likely it is that any row does."""

    rows: Tensor
    own: Tensor
    used: Tensor


def blocks(case: Case) -> BlockCounts:
    if case.length <= case.block * case.topk:  # dense: one block
        rows = torch.tensor([float(case.queries * group(case))], dtype=torch.float64)
        return BlockCounts(rows, rows, torch.ones_like(rows))
    position = torch.arange(case.length - case.queries, case.length)
    own = (position // case.block).bincount(minlength=-(-case.length // case.block)).double()
    index = torch.arange(len(own), dtype=torch.float64)
    # Of queries in block c: how likely one chooses a given earlier block that is no sink.
    sinks = index.clamp(max=case.sinks)
    free = (case.topk - 1 - sinks) / (index - sinks).clamp(min=1)
    chance = free.clamp(max=1.0)
    later = after(own * chance)
    later[: case.sinks] = after(own)[: case.sinks]
    missed = after(own * group(case) * torch.log1p(-chance.clamp(max=1 - 1e-12)))
    used = 1 - missed.exp()
    used[own > 0] = 1
    used[: case.sinks] = 1
    return BlockCounts(group(case) * (own + later), group(case) * own, used)


def after(values: Tensor) -> Tensor:
    """The sum of the values after each."""
    return values.sum() - values.cumsum(0)


def group(case: Case) -> int:
    return case.heads // case.kv_heads


def routes(case: Case) -> float:
    """Pairs of a row and a block that it attends, of all kv heads."""
    return float(blocks(case).rows.sum()) * case.batch * case.kv_heads


def scored(case: Case) -> int:
    """Pairs of a row and a block that its gate scores, of all heads; 0 where it is dense."""
    if case.length <= case.block * case.topk:
        return 0
    position = torch.arange(case.length - case.queries, case.length)
    return int((position // case.block).sum()) * case.batch * case.heads


def tile_fill(case: Case, rows: int) -> float:
    """The share of tiles of so many rows that holds rows: a tile never crosses a block."""
    held = blocks(case).rows
    return float(held.sum() / ((held / rows).ceil() * rows).sum())


def computed_pairs(case: Case, rows: int, keys: int) -> float:
    """Pairs of a query and a key that tiles of rows by keys compute, of all heads.

    A tile computes all its rows, and in their own block whole tiles of keys up to the last that one
    of its rows sees.
    """
    block = case.length if case.length <= case.block * case.topk else case.block
    counted = blocks(case)
    tokens = rows / group(case)
    own = min(block, (block + min(keys, block) + tokens) / 2) * float(counted.own.sum())
    earlier = float((counted.rows - counted.own).sum()) * block
    return (own + earlier) / tile_fill(case, rows) * case.batch * case.kv_heads


class Sizes(NamedTuple):
    """Bytes of a case's tensors."""

    query: int
    key: int
    lse: int
    means: int


def sizes(case: Case) -> Sizes:
    width = DTYPES[case.dtype].itemsize
    by_query = case.batch * case.heads * case.queries
    by_key = case.batch * case.kv_heads * case.length * case.dim
    return Sizes(
        by_query * case.dim * width, by_key * width, by_query * 4, by_key * 4 // case.block
    )


def compulsory_bytes(case: Case) -> float:
    """Bytes that no kernel can help but read or write: each tensor once, keys where attended."""
    size, used = sizes(case), float(blocks(case).used.mean())
    attended = 2 * size.key * used
    gated = scored(case) > 0
    keys_for_means = 0 if case.means or not gated else size.key * (1 - used)
    moved = 2 * size.query + attended + size.lse + keys_for_means + size.means * gated * case.means
    if case.backward:  # q, k, v, out, its gradient and lse again; dq, dk, dv
        moved += 4 * size.query + 2 * attended + size.lse
    return moved


def needed_bytes(case: Case, expanded: bool) -> float:
    """Memory for the inputs and whichever of dense and moonfx needs more beside them."""
    size = sizes(case)
    wide = size.key * group(case)
    held = size.query + 2 * size.key + 2 * wide * expanded + size.means * case.means
    dense = size.query + size.lse
    sparse = dense + 12 * routes(case) + SCRATCH
    if case.backward:
        held += size.query
        float32 = 4 // DTYPES[case.dtype].itemsize
        dense += size.query * (1 + float32) + 2 * wide
        sparse += size.query + 2 * size.key
    return held + max(dense, sparse)
