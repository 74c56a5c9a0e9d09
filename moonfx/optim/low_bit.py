"""The momentum in 8 bits, as torchao's optimizers keep their states: an eighth of AdamW's.

A number is one of 256 codes of a dynamic map, times a scale per 2048 numbers. The update comes from
the float momentum before that is rounded into codes again: only what the next step averages with
was rounded. A tensor takes codes if it has 4096 numbers or more, in whole blocks; others are small.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# torchao's 4 bits and fp8 are not taken: with 4 the loss ended half as high again where with 8 it
# ended where floats do (tests/optim/test_muon_low_bit.py's problem), and fp8 cannot be pickled.
BLOCKS = {"int8": 2048}
SMALLEST = 4096


def zeros(p: Tensor, kind: str | None) -> Tensor:
    """A momentum of a parameter that has had no gradient: p's dtype, or codes where they fit."""
    if isinstance(p, DTensor):
        return _wrapped(zeros(p.to_local(), kind), p)
    if kind is None or why_not(p, kind):
        return torch.zeros_like(p, memory_format=torch.preserve_format)
    made: Tensor = _class().zeros(p.shape, True, BLOCKS[kind], p.device, p.dtype)
    return made


def stored(p: Tensor, momentum: Tensor, kind: str | None) -> Tensor:
    """A float momentum of a parameter as it is kept; itself where that is in floats."""
    if kind is None:
        return momentum
    local = p.to_local() if isinstance(p, DTensor) else p
    if why_not(local, kind):
        return momentum
    kept = zeros(p, kind)
    source = momentum.to_local() if isinstance(momentum, DTensor) else momentum
    target = kept.to_local() if isinstance(kept, DTensor) else kept
    target.copy_(source.float().contiguous())
    return kept


def why_not(p: Tensor, kind: str) -> str | None:
    """Why a parameter's momentum stays in floats, None if it takes codes."""
    numbers, block = p.numel(), BLOCKS[kind]
    if numbers < SMALLEST:
        return f"its momentum stays in floats: {numbers} numbers are fewer than {SMALLEST}"
    if numbers % block:
        return f"its momentum stays in floats: {numbers} numbers are no whole blocks of {block}"
    return None


def has_codes(buffer: Tensor) -> bool:
    """Whether a momentum is of one of torchao's classes."""
    return hasattr(buffer, "codes")


def floats(buffer: Tensor) -> Tensor:
    """The numbers of a momentum that has codes."""
    made: Tensor = buffer.dequantize(torch.float32)  # type: ignore[call-arg]
    return made


def _wrapped(local: Tensor, p: DTensor) -> DTensor:
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def cloned(buffer: Tensor) -> Tensor:
    """A copy of a momentum that has codes: torchao has none."""
    names, rest = buffer.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(buffer, name).clone() for name in names}
    made: Tensor = type(buffer).__tensor_unflatten__(parts, rest)  # type: ignore[attr-defined]
    return made


def _class() -> Any:
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ValueError(
            f"a momentum in int8 needs torchao, which cannot be imported ({error}): "
            "pip install torchao, or momentum_dtype=None"
        ) from error
    return OptimState8bit
