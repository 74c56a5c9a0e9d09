"""Masks as a user gives them, or as they come into a graph after a graph break."""

import torch
from torch import Tensor

B, H, N = 2, 2, 24
HIDDEN = torch.finfo(torch.float32).min


def causal(queries: int = N, keys: int = N) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, HIDDEN)


def padded(side: str) -> Tensor:
    """bool [B, N], the second row with 5 tokens of padding."""
    real = torch.ones(B, N, dtype=torch.bool)
    real[1, slice(0, 5) if side == "left" else slice(N - 5, N)] = False
    return real


def with_padding(side: str) -> Tensor:
    return causal() & padded(side)[:, None, None, :]


ONE_OFF = causal()
ONE_OFF[3, 7] = True
