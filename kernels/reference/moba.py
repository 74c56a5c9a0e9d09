"""MoBA by its definition: the oracle of every test, never on a hot path (arXiv 2502.13189).

    eq. 6   s_i = <q, mean(K[block i])>                       the gate: one score per other block
    eq. 5   g_i = 1 for the query's own block and the best-scored others, topk in all
    eq. 4   I   = union of the chosen blocks' keys
    eq. 2   out = softmax(scale * q K[I]^T) V[I]              causal inside the own block

Shape letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim,
Dv value dim, n blocks.

Query i stands at key index Nk - Nq + i. With a `key_mask` a key's position is its rank among the
real keys of its row, so that padding neither counts nor shifts a block. Beyond the paper:

    sinks       that many first blocks are always chosen; they count in topk
    causal      False: every real key is visible and later blocks are candidates too (Nq = Nk)
    softcap c   the softmax's scores are c tanh(scale q.k / c); the gate's are not capped
    key_bias b  is added to the softmax's scores, mean(b[block i]) / scale to the gate's
    segments    a row of packed sequences: each is computed as if the others were padding
    block_means the gate reads them in place of mean(K[block i]): a cache has them already

Every product and sum is in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments


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


def gate_means(
    key: Tensor, block: int, real: Tensor, rank: Tensor, given: Tensor | None = None
) -> Tensor:
    """`block_means`, of which the first are replaced by the `given` ones, [B, Hkv, m, D]."""
    means = block_means(key, block, real, rank)
    if given is None:
        return means
    given = given[:, :, : means.shape[2]].to(means.dtype)
    assert given.shape[2] >= (key.shape[2] - 1) // block, (given.shape, key.shape, block)
    return torch.cat([given, means[:, :, given.shape[2] :]], 2)


def last_positions(rank: Tensor, queries: int, causal: bool) -> Tensor:
    """The position of the last key that each query sees, [B, 1, Nq, 1]; -1 for none."""
    last = rank[:, rank.shape[1] - queries :] if causal else rank[:, -1:].expand(-1, queries)
    return last[:, None, :, None]


def select_blocks(query: Tensor, key: Tensor, arguments: MobaArguments) -> Tensor:
    """Which blocks each query attends (eq. 5 and 6).

    Args:
        query: [B, Hq, Nq, D], any float dtype.
        key: [B, Hkv, Nk, D], Nk >= Nq, Hq a multiple of Hkv.
        arguments: all but softcap and segments matter here; the scale beside a key_bias only.
    Returns:
        bool [B, Hq, Nq, n] with n = ceil(Nk / block); all False for a query that sees no real key.
    """
    block, topk, sinks, causal = arguments.block, arguments.topk, arguments.sinks, arguments.causal
    key_bias = arguments.key_bias
    batch, heads, queries, dim = query.shape
    length = key.shape[2]
    assert arguments.block_means is None or causal, "a later block needs a mean as well"
    real, rank = key_positions(batch, length, arguments.key_mask, key.device)
    means = gate_means(key, block, real, rank, arguments.block_means)
    means = means.repeat_interleave(heads // key.shape[1], 1)
    score = query.to(means.dtype) @ means.transpose(-1, -2)  # eq. 6, no softmax scale
    if key_bias is not None:
        bias = gate_means(key_bias.expand(batch, -1, -1)[..., None], block, real, rank)
        score = score + bias.transpose(-1, -2) / arguments.scale_for(dim)

    own = rank[:, None, length - queries :, None].clamp(min=0) // block  # [B, 1, Nq, 1]
    index = torch.arange(means.shape[2], device=key.device)
    there = index * block <= last_positions(rank, queries, causal)
    fixed = there & (index.eq(own) | (index < sinks))
    candidate = there & ~fixed
    # A stable sort keeps the lower of two equal blocks first.
    score = score.masked_fill(~candidate, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = order.argsort(-1)  # the block's place among the candidates, 0 is best
    return fixed | (candidate & (place < topk - fixed.sum(-1, keepdim=True)))


def moba_attention(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks (eq. 2), differentiable by autograd, the gate excepted.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, and lse [B, Hq, Nq], the natural logarithm of the
        softmax's denominator, float32 (float64 for float64). A query that sees no real key gives
        0 and -inf.
    """
    if arguments.segments is not None:
        return each_segment_alone(query, key, value, arguments)
    batch, heads, queries, dim = query.shape
    group, length = heads // key.shape[1], key.shape[2]
    scale, softcap, key_bias = arguments.scale_for(dim), arguments.softcap, arguments.key_bias
    real, rank = key_positions(batch, length, arguments.key_mask, key.device)
    with torch.no_grad():
        chosen = select_blocks(query, key, arguments)
        key_block = rank.clamp(min=0)[:, None, None, :] // arguments.block
        visible = chosen.gather(-1, key_block.expand(batch, heads, queries, length))
        visible &= real[:, None, None, :]
        visible &= rank[:, None, None, :] <= last_positions(rank, queries, arguments.causal)

    key = only_real(key, real).repeat_interleave(group, 1)
    value = only_real(value, real).repeat_interleave(group, 1)
    score = scale * (query.to(key.dtype) @ key.transpose(-1, -2))
    if softcap > 0:
        score = softcap * (score / softcap).tanh()
    if key_bias is not None:
        score = score + key_bias.masked_fill(~real[:, None, :], 0.0)[:, :, None, :]
    score = score.masked_fill(~visible, -torch.inf)
    lse = score.logsumexp(-1)
    probability = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return (probability @ value).to(query.dtype), lse


def each_segment_alone(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor]:
    """`moba_attention` of packed sequences: each as if the others were padding."""
    segments, mask = arguments.segments, arguments.key_mask
    assert segments is not None
    assert arguments.block_means is None, "they are numbered by row, not by segment"
    mine = segments[:, None, key.shape[2] - query.shape[2] :]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = torch.full_like(query[..., 0], -torch.inf, dtype=accumulation_dtype(query))
    for sequence in segments.unique():
        real = segments.eq(sequence) if mask is None else mask & segments.eq(sequence)
        one = arguments._replace(key_mask=real, segments=None)
        alone, alone_lse = moba_attention(query, key, value, one)
        out = torch.where(mine.eq(sequence)[..., None], alone, out)
        lse = torch.where(mine.eq(sequence), alone_lse, lse)
    return out, lse


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def only_real(tensor: Tensor, real: Tensor) -> Tensor:
    """[B, H, N, D] in the accumulation dtype, padding zeroed: not even a NaN there may count."""
    return tensor.to(accumulation_dtype(tensor)).masked_fill(~real[:, None, :, None], 0.0)
