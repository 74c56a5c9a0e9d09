"""The numbers of a tensor, whether it is sharded over processes or kept as codes."""

import math

import torch
from torch import Tensor

from moonfx.optim.sharding import is_sharded
from moonfx.optim.state import low_bit


def has_codes(value: Tensor) -> bool:
    """Whether a tensor, or this process's part of it, is of one of torchao's classes."""
    return low_bit.has_codes(value.to_local() if is_sharded(value) else value)


def dequantized(value: Tensor) -> Tensor:
    """The floats of a tensor or of torchao's codes; float tensors as they are."""
    if is_sharded(value):
        local = value.to_local()
        if not has_codes(local):
            return value
        return type(value).from_local(
            dequantized(local),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    if not has_codes(value):
        return value
    floats: Tensor = value.dequantize(torch.float32)  # type: ignore[call-arg]
    return floats


def number(value: Tensor) -> float:
    """A scalar's value, the same on every process: of a sharded tensor each knows a part only."""
    return float(value.full_tensor() if is_sharded(value) else value)


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if is_sharded(value):  # a maximum over processes may lose a NaN, a count does not
        return number((~value.isfinite()).sum()) == 0
    # One pass without a copy: the largest magnitude is NaN where one is.
    return not value.numel() or math.isfinite(torch.linalg.vector_norm(value, math.inf).item())


def gathered(value: Tensor) -> Tensor:
    """A tensor's floats, from all processes if it is sharded, decoded if it is quantized."""
    if is_sharded(value):
        value = value.full_tensor()
    return value.dequantize() if low_bit.has_codes(value) else value
