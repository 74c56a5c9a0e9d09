"""MoBA as a loop over single queries in plain Python: the oracle of the reference."""

import itertools
import math

import torch
from torch import Tensor

from tests.support.moba_cases import Case


def loop(case: Case, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MoBA one query at a time, in Python numbers: out, lse and the chosen blocks."""
    blocks = -(-case.length // case.block)
    mask, segments, bias = case.key_mask(), case.segments(), case.full_bias()
    means = case.block_means()
    out = torch.zeros(*query.shape[:3], case.value_dim)
    lse = torch.full(query.shape[:3], -math.inf)
    chosen = torch.zeros(*query.shape[:3], blocks, dtype=torch.bool)
    for b in range(case.batch):
        real = [j for j in range(case.length) if mask is None or mask[b, j]]
        for h, i in itertools.product(range(query.shape[1]), range(case.queries)):
            here = case.length - case.queries + i
            mine = [j for j in real if segments is None or segments[b, j] == segments[b, here]]
            own = max(0, sum(j <= here for j in mine) - 1) // case.block
            seen = [j for j in mine if j <= here or not case.causal]
            if not seen:
                continue
            q = query[b, h, i].tolist()
            k = [key[b, h // case.group, j].tolist() for j in seen]
            v = [value[b, h // case.group, j].tolist() for j in seen]
            extra = [0.0 if bias is None else bias[b, h, j].item() for j in seen]
            given = None if means is None else means[b, h // case.group].tolist()
            picked = pick(case, q, k, extra, own, given)
            chosen[b, h, i, list(picked)] = True
            keys = [r for r in range(len(seen)) if r // case.block in picked]
            weights = [math.exp(score(case, q, k[r]) + extra[r]) for r in keys]
            total = sum(weights)
            lse[b, h, i] = math.log(total)
            for d in range(case.value_dim):
                mixed = sum(w * v[r][d] for w, r in zip(weights, keys, strict=True))
                out[b, h, i, d] = mixed / total
    return out, lse, chosen


def pick(
    case: Case,
    query: list[float],
    keys: list[list[float]],
    bias: list[float],
    own: int,
    means: list[list[float]] | None,
) -> set[int]:
    """The blocks of a query that sees `keys`, with `bias`, and whose own block is `own`."""
    blocks = -(-len(keys) // case.block)
    if blocks <= case.topk:
        return set(range(blocks))
    picked = {own, *range(case.sinks)}
    gate = {}
    for block in set(range(blocks)) - picked:
        here = slice(block * case.block, (block + 1) * case.block)
        mean = [sum(column) / len(keys[here]) for column in zip(*keys[here], strict=True)]
        mean = mean if means is None else means[block]
        gate[block] = dot(query, mean) + sum(bias[here]) / len(bias[here]) / scale_of(case)
    while len(picked) < case.topk:
        best = max(gate, key=lambda block: (gate[block], -block))
        picked.add(best)
        del gate[best]
    return picked


def score(case: Case, query: list[float], key: list[float]) -> float:
    plain = scale_of(case) * dot(query, key)
    return case.softcap * math.tanh(plain / case.softcap) if case.softcap else plain


def scale_of(case: Case) -> float:
    return case.dim**-0.5 if case.scale is None else case.scale


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
