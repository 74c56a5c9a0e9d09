"""Results that lie by token: [B, H, N, D] over storage [B, N, H, D].

A model's transpose and reshape to [B, N, H * D] then copy nothing. These strides are part of the
operator's contract (moonfx/ops/moba.py), so every backend and the fake kernel take them from here.
"""

from collections.abc import Sequence

import torch
from torch import SymInt, Tensor


def empty_by_token(like: Tensor, width: int | SymInt) -> Tensor:
    """[B, H, N, width] for a `like` of [B, H, N, any], in its dtype and on its device."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def zeros_by_token(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros [B, H, N, D] on the CPU.

    Zeroed memory comes from the system already zero, at no cost that `empty` would save.
    """
    batch, heads, length, dim = shape
    return torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
