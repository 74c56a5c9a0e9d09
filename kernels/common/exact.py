"""Scores that are compared to the last bit: exact products, and an order that leaves room for ties.

The gate picks blocks by score. A product in TF32 or bfloat16 would flip near-ties, and two equal
scores must go to the lower block on every device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def sortable(score: Tensor) -> Tensor:
    """float32 -> int64 in the same order, unequal ones 2**32 apart: room to break a tie."""
    bits = (score + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products without TF32 or bfloat16 inside: a rounded gate would flip near-ties."""
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = torch.backends.cuda.matmul, mkldnn
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
