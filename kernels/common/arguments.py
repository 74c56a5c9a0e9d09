"""What a call asks of a kernel beside its query, key and value."""

from typing import NamedTuple

from torch import Tensor


class Policy(NamedTuple):
    """The arguments after the tensors, in every kernel's order, as reference/moba.py defines them.

    Args:
        key_mask: bool [B, Nk]. key_bias: float32 [B or 1, Hq or 1, Nk]. segments: integers [B, Nk].
        block_means: float32 [B, Hkv, m, D], m at least the blocks before the last key's.
    """

    block: int
    topk: int
    sinks: int = 0
    scale: float | None = None
    key_mask: Tensor | None = None
    causal: bool = True
    softcap: float = 0.0
    key_bias: Tensor | None = None
    segments: Tensor | None = None
    block_means: Tensor | None = None
