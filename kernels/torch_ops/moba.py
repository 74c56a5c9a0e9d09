"""MoBA in torch operations, for any device: only the selected work, in memory linear in N.

    eq. 6   gate    plan.py: a (query row, block) pair, a route, per chosen block
    eq. 4   sort    common/sequences.py: a block is a run of keys; plan.py: routes by block
    eq. 2   tile    S = c tanh(scale Q K^T / c) + bias,  P = exp(S - lse),  O = P V
            merge   O = sum_j exp(lse_j - lse) O_j,  lse = log sum_j exp(lse_j)
            back    dS = P (dO V^T - delta + dlse),  delta = rowsum(dO O),  dbias = sum_rows dS
                    dQ = dR K,  dK = dR^T Q,  dR = scale (1 - tanh^2) dS

The own block is a route like any other. Tiles are batched products over gathered keys, which stop
at the last key that one of a tile's rows sees. Work goes in passes over batch rows, key/value heads
and, when one head is too much, queries. A pass holds about `Budget.partials` bytes of partial
results (one per route) and, at a time, `Budget.tiles` bytes of gathered tiles and scores, or one
tile if that is larger (128 rows x block). Beyond that there is a float32 gradient of the pass's
keys and values, and copies of the inputs: nothing is N x N or N x blocks x D.

A merge is a gather in the order of the slots, never a scatter. The one sum over tiles (dK, dV,
dbias) is an `index_add_`, which is in order on CPU and which torch replaces by a sorted sum on CUDA
when `torch.use_deterministic_algorithms(True)` is set: the backward is then bitwise repeatable.

Shape letters: B batch, Hq = Hkv * G heads, Nq queries, Nk keys, D head dim, Dv value dim; within a
pass b batch rows, h key/value heads, R rows (batch row, key/value head, query, G) and M = b h Nk
sorted keys; P tiles at a time, of T rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.torch_ops.plan import TilePlan, plan
from moonfx.kernels.torch_ops.problem import Problem, QueryPass


def available() -> str | None:
    """None: torch operations run anywhere."""
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor]:
    """MoBA (eq. 2) of q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], of any strides.

    Returns:
        out [B, Hq, Nq, Dv] in query's dtype, stored by token, and lse, float32 [B, Hq, Nq].
        0 and -inf for a query that sees no real key.
    """
    out = empty_by_token(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    problem = Problem(query, key, value, arguments)
    for rows, heads in problem.head_passes():
        keys, values, biases = problem.sorted(key, value, rows, heads)
        for queries in problem.query_passes():
            region = rows, heads, queries
            plans = plan(QueryPass(problem, region), keys, biases)
            table = with_last(problem.by_kv_head(query)[region], 1, 0.0)
            parts = [attend(tiles, table, keys, values, biases, problem) for tiles in plans]
            result, total = merge(plans, parts)
            target = problem.by_kv_head(out)[region]
            target.copy_(result.view(target.shape))
            target = problem.by_kv_head(lse)[region]
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
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`, whose out and lse it takes; the routes are found again, not saved.

    Args:
        grad_out: like out. grad_lse: like lse, or None for zero.
    Returns:
        Gradients of query, key and value, in their dtypes, stored by token; and of key_bias as if
        it were float32 [B, Hq, Nk], or None if there is none.
    """
    grads = tuple(empty_by_token(tensor, tensor.shape[3]) for tensor in (query, key, value))
    grad_query, grad_key, grad_value = grads
    grad_bias = None
    if arguments.key_bias is not None:
        grad_bias = arguments.key_bias.new_zeros(query.shape[0], query.shape[1], key.shape[2])
    if grad_query.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_bias
    problem = Problem(query, key, value, arguments)
    by_key = [grad_key, grad_value]
    if grad_bias is not None:
        by_key.append(problem.by_kv_head(grad_bias))
    for rows, heads in problem.head_passes():
        keys, values, biases = problem.sorted(key, value, rows, heads)
        sums = [
            torch.zeros_like(table, dtype=torch.float32)
            for table in (keys, values, biases)
            if table is not None
        ]
        for queries in problem.query_passes():
            region = rows, heads, queries
            plans = plan(QueryPass(problem, region), keys, biases)
            delta = problem.by_kv_head(grad_out)[region].float() * problem.by_kv_head(out)[region]
            delta = delta.sum(-1)
            if grad_lse is not None:
                delta = delta - problem.by_kv_head(grad_lse)[region]
            tables = (
                with_last(problem.by_kv_head(query)[region], 1, 0.0),
                with_last(problem.by_kv_head(grad_out)[region], 1, 0.0),
                with_last(problem.by_kv_head(lse)[region], 0, torch.inf),  # P = 0 in a tile's rest
                with_last(delta, 0, 0.0),
            )
            target = problem.by_kv_head(grad_query)[region]
            total = torch.zeros(target.shape, device=target.device).flatten(0, 3)
            for tiles in plans:
                part = attend_backward(tiles, tables, keys, values, biases, sums, problem)
                for place in tiles.place.unbind(-1):
                    total += part[place]
            target.copy_(total.view(target.shape))
        for grad, flat in zip(by_key, sums, strict=True):
            target = grad[rows, heads]
            target.copy_(problem.sequences.unsort(flat, target.shape, rows))
    return grad_query, grad_key, grad_value, grad_bias


def scores(
    query: Tensor, key: Tensor, bias: Tensor | None, hidden: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """float32 [P, T, keys], -inf where hidden; and the softcap's tanh, which its slope is from."""
    score = product(query, key.mT).mul_(problem.scale)
    tanh = None
    if problem.softcap > 0:
        tanh = score.div_(problem.softcap).tanh_()
        score = tanh * problem.softcap
    if bias is not None:
        score += bias
    if hidden is not None:
        score.masked_fill_(hidden, -torch.inf)
    return score, tanh


def attend(
    tiles: TilePlan,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    biases: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Each route's own softmax: float32 output [slots + 1, Dv] and lse [slots + 1]."""
    size = tiles.rows.shape[1]
    out = torch.empty(tiles.slots + 1, values.shape[-1], device=values.device)
    lse = torch.empty(tiles.slots + 1, device=values.device)
    out[-1], lse[-1] = 0.0, -torch.inf
    for chosen, extent in tiles.batches(problem.width, problem.budget.tiles):
        rows, index = tiles.rows[chosen], tiles.keys(chosen, extent, len(keys))
        bias = None if biases is None else of_group(biases[index].mT, rows % problem.group)
        hidden = tiles.hidden(chosen, extent)
        score, _ = scores(table[rows], gather_rows(keys, index), bias, hidden, problem)
        top = score.amax(-1, keepdim=True)
        probability = score.sub_(top).exp_()
        total = probability.sum(-1, keepdim=True)
        result = product(probability, gather_rows(values, index)).div_(total)
        out[:-1].unflatten(0, (-1, size))[chosen] = result
        lse[:-1].unflatten(0, (-1, size))[chosen] = (top + total.log()).squeeze(-1)
    return out, lse


def merge(plans: list[TilePlan], parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
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
    tiles: TilePlan,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    biases: Tensor | None,
    sums: list[Tensor],
    problem: Problem,
) -> Tensor:
    """Adds to dK, dV and dbias in `sums`; returns each route's dQ, float32 [slots + 1, D]."""
    size, group = tiles.rows.shape[1], problem.group
    grad_query = torch.empty(tiles.slots + 1, keys.shape[-1], device=keys.device)
    grad_query[-1] = 0.0
    for chosen, extent in tiles.batches(2 * problem.width, problem.budget.tiles // 2):
        rows, index = tiles.rows[chosen], tiles.keys(chosen, extent, len(keys))
        key, value = gather_rows(keys, index), gather_rows(values, index)
        query, grad_out, lse, delta = (table[rows] for table in tables)
        bias = None if biases is None else of_group(biases[index].mT, rows % group)
        score, tanh = scores(query, key, bias, tiles.hidden(chosen, extent), problem)
        probability = score.sub_(lse[..., None]).exp_()
        add(sums[1], index, product(probability.mT, grad_out))
        grad_score = product(grad_out, value.mT).sub_(delta[..., None]).mul_(probability)
        if biases is not None:
            member = F.one_hot(rows % group, group).float()  # [P, T, G]
            add(sums[2], index, product(grad_score.mT, member))
        if tanh is not None:
            grad_score.addcmul_(grad_score * tanh, tanh, value=-1.0)
        grad_score.mul_(problem.scale)
        add(sums[0], index, product(grad_score.mT, query))
        grad_query[:-1].unflatten(0, (-1, size))[chosen] = product(grad_score, key)
    return grad_query


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [P, keys, X] of a table [M, X]."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def add(table: Tensor, index: Tensor, part: Tensor) -> None:
    """The inverse of `gather_rows`: adds [P, keys, X] to the rows of a table."""
    table.index_add_(0, index.flatten(), part.flatten(0, 1))


def of_group(biases: Tensor, member: Tensor) -> Tensor:
    """[P, G, keys] and each row's place in its group, [P, T] -> [P, T, keys]."""
    return biases.take_along_dim(member[..., None], 1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in float32, from operands in right's dtype where the device does that."""
    if right.dtype != torch.float32 and right.is_cuda and torch.version.hip is None:
        return torch.bmm(left.to(right.dtype), right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def with_last(rows: Tensor, dims: int, last: float) -> Tensor:
    """A pass's rows as a table [R + 1, ...] whose last row stands for "no row"."""
    flat = rows.reshape(-1, *rows.shape[rows.dim() - dims :])
    return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), last)])
