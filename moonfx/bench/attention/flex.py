"""FlexAttention with this library's mask: what torch itself can do with the same choice of blocks.

Its BlockMask names, for each tile of queries, every block that one of them chose, so a mask of
tokens inside the tiles keeps the choice exact. Both are built from a table [B, H, N, n] of chosen
blocks; the time of building them is not part of the call, and is reported apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moonfx.bench.attention.cases import Case
from moonfx.bench.attention.contenders import Inputs, run
from moonfx.bench.harness.machine import Absent
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference

TILE = 128
TABLE_BYTES = 4 << 30


def flex(case: Case, given: Inputs) -> tuple[Callable[[], object], Callable[[], BlockMask]]:
    """The call, and what builds its mask anew (the call has one already)."""
    query, key, value = given.query, given.key, given.value
    if case.backward and query.device.type == "cpu":
        raise Absent("FlexAttention has no backward on a CPU")
    if case.queries != case.length:
        raise Absent("its mask is built for as many queries as keys")
    if case.block % TILE or case.length % case.block:
        raise Absent(f"its tiles of {TILE} keys would cross blocks of {case.block}")
    table = case.batch * case.heads * case.length * (case.length // case.block)
    if table > TABLE_BYTES:
        raise Absent(f"its table of chosen blocks would take {table / 2**30:.0f} GiB")

    # A length is compiled as a constant, and Dynamo stops compiling after a few of them.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = block_mask(case, query, key)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask, enable_gqa=case.heads > case.kv_heads)

    call = run(attention, [query, key, value], given.gradient)
    call()  # compiles
    return call, lambda: block_mask(case, query, key)


def block_mask(case: Case, query: Tensor, key: Tensor) -> BlockMask:
    block, chosen = case.block, choice(case, query, key)

    def mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & chosen[batch, head, i, j // block]

    by_tile = chosen.unflatten(2, (-1, TILE))
    tiles = case.length // TILE
    index = torch.arange(tiles, device=query.device)
    some, full = (x.repeat_interleave(block // TILE, -1) for x in (by_tile.any(3), by_tile.all(3)))
    full &= index < index[:, None]
    some &= (index <= index[:, None]) & ~full
    return BlockMask.from_kv_blocks(
        *listed(some),
        *listed(full),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=mask,
        seq_lengths=(case.length, case.length),
    )


def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last dim are True, and their indices first, ascending: int32."""
    order = tiles.byte().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()


def choice(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Chosen blocks, bool [B, H, N, n], some queries at a time."""
    step = max(TILE, (64 << 20) // (case.batch * case.heads * (case.length // case.block)))
    chosen = torch.zeros(
        *query.shape[:3], case.length // case.block, dtype=torch.bool, device=query.device
    )
    for first in range(0, case.length, step):
        end = min(first + step, case.length)
        part = reference.select_blocks(
            query[:, :, first:end],
            key[:, :, :end],
            MobaArguments(case.block, case.topk, sinks=case.sinks),
        )
        chosen[:, :, first:end, : part.shape[3]] = part
    return chosen
