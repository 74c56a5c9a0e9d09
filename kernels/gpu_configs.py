"""Tile shapes of the GPU kernels: a small table by kernel and head dim, so that few compile."""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """block_m rows by block_n keys in a tile, and Triton's num_warps and num_stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose(kernel: str, dim: int, dtype: torch.dtype, block: int) -> Config:
    """The configuration of `kernel` for a head dim (the larger of D and Dv), dtype and block."""
    del kernel
    wide = max(dim, 64) * (2 if dtype == torch.float32 else 1)
    return Config(64, 64 if block >= 64 and wide <= 128 else 32, 4, 2)
