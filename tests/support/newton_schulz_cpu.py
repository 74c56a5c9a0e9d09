"""The operator and the C++ kernel of Newton-Schulz as tests call them."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import newton_schulz as newton_schulz_cpu
from tests.support.newton_schulz_cases import (
    COEFFICIENTS,
)

OPERATOR = torch.ops.moonfx.newton_schulz
CPU = torch.device("cpu")
QUINTIC = COEFFICIENTS["quintic"]
DTYPES = (torch.bfloat16, torch.float32)

needs_kernel = pytest.mark.skipif(
    cpu_build.available() is not None, reason="needs a C++ compiler for the CPU kernel"
)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU kernel rounds to `dtype` between products: it may compute in float32."""
    return (
        cpu_build.available() is None and cpu_build.compute_dtype(cpu_build.load(), dtype) == dtype
    )


def cpu_kernel(X: Tensor, name: str, runs: tuple[int, ...]) -> Tensor:
    return newton_schulz_cpu.newton_schulz(X.unsqueeze(0), COEFFICIENTS[name], runs)[0]
