"""MoBA by its definition: the oracle of every test, never on a hot path (arXiv 2502.13189).

    eq. 6   s_i = <q, mean(K[block i])>                       the gate: one score per earlier block
    eq. 5   g_i = 1 for the query's own block and the best-scored earlier blocks, topk in all
    eq. 4   I   = union of the chosen blocks' keys
    eq. 2   out = softmax(scale * q K[I]^T) V[I]              causal inside the own block

Shape letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim,
Dv value dim, n blocks.

Query i stands at key index Nk - Nq + i. With a `key_mask` a key's position is its rank among the
real keys of its row, so that padding neither counts nor shifts a block. `sinks` (0 in the paper) is
how many first blocks are always chosen; they count in topk. Every product and sum is in float32
(float64 for float64 inputs).
"""

import torch
from torch import Tensor


def key_positions(
    batch: int, length: int, key_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which keys are real, and how many real keys lie at or before each key, less one.

    Returns:
        real, bool [B, Nk], and rank, int64 [B, Nk]: the position of a real key; for padding, that
        of the last real key before it, or -1.
    """
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    if key_mask is not None:
        real = key_mask
    return real, real.long().cumsum(-1) - 1


def block_means(key: Tensor, block: int, real: Tensor, rank: Tensor) -> Tensor:
    """The mean of each block's real keys, [B, Hkv, n, D], never rounded to key's dtype.

    A block without a real key gives zero.
    """
    blocks = -(-key.shape[2] // block)
    index = torch.arange(blocks, device=key.device)
    member = (rank // block).unsqueeze(1).eq(index[:, None]) & real.unsqueeze(1)  # [B, n, Nk]
    weight = member.to(accumulation_dtype(key))
    total = torch.einsum("bnk,bhkd->bhnd", weight, only_real(key, real))
    return total / weight.sum(-1).clamp(min=1)[:, None, :, None]


def select_blocks(
    query: Tensor,
    key: Tensor,
    block: int,
    topk: int,
    *,
    sinks: int = 0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Which blocks each query attends (eq. 5 and 6).

    Args:
        query: [B, Hq, Nq, D], any float dtype.
        key: [B, Hkv, Nk, D], Nk >= Nq, Hq a multiple of Hkv.
        block: tokens in a block, >= 1.
        topk: blocks per query, the own block and the sinks counted, >= 1.
        sinks: first blocks that are always chosen, < topk.
        key_mask: bool [B, Nk], True for a real token; None when all are.
    Returns:
        bool [B, Hq, Nq, n] with n = ceil(Nk / block); all False for a query that sees no real key.
    """
    batch, heads, queries, _ = query.shape
    length = key.shape[2]
    real, rank = key_positions(batch, length, key_mask, key.device)
    means = block_means(key, block, real, rank).repeat_interleave(heads // key.shape[1], 1)
    score = query.to(means.dtype) @ means.transpose(-1, -2)  # eq. 6, no softmax scale

    position = rank[:, None, length - queries :, None]  # [B, 1, Nq, 1], -1: sees no real key
    own = position.div(block, rounding_mode="floor")
    index = torch.arange(means.shape[2], device=key.device)
    candidate = (index >= sinks) & (index < own)
    # A stable sort keeps the lower of two equal blocks first.
    score = score.masked_fill(~candidate, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = order.argsort(-1)  # the block's place among the candidates, 0 is best
    best = candidate & (place < topk - 1 - sinks)
    chosen = index.eq(own) | (index < sinks) | best
    return torch.where(own < topk, index <= own, chosen) & (position >= 0)


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    *,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks (eq. 2), differentiable by autograd, the gate excepted.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        scale: factor on q.k in the softmax, D**-0.5 by default; the gate has none.
        The rest as in `select_blocks`.
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, and lse [B, Hq, Nq], the natural logarithm of the
        softmax's denominator, float32 (float64 for float64). A query that sees no real key gives
        0 and -inf.
    """
    batch, heads, queries, dim = query.shape
    group, length = heads // key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    real, rank = key_positions(batch, length, key_mask, key.device)
    with torch.no_grad():
        chosen = select_blocks(query, key, block, topk, sinks=sinks, key_mask=key_mask)
        key_block = rank.clamp(min=0)[:, None, None, :] // block
        visible = chosen.gather(-1, key_block.expand(batch, heads, queries, length))
        visible &= real[:, None, None, :]
        visible &= rank[:, None, None, :] <= rank[:, None, length - queries :, None]

    key = only_real(key, real).repeat_interleave(group, 1)
    value = only_real(value, real).repeat_interleave(group, 1)
    score = scale * (query.to(key.dtype) @ key.transpose(-1, -2))
    score = score.masked_fill(~visible, -torch.inf)
    lse = score.logsumexp(-1)
    probability = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return (probability @ value).to(query.dtype), lse


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def only_real(tensor: Tensor, real: Tensor) -> Tensor:
    """[B, H, N, D] in the accumulation dtype, padding zeroed: not even a NaN there may count."""
    return tensor.to(accumulation_dtype(tensor)).masked_fill(~real[:, None, :, None], 0.0)
