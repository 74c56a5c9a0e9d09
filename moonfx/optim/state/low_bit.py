"""The momentum in 8 bits, as torchao's optimizers keep their states: an eighth of AdamW's.

A number is one of 256 codes of a dynamic map, times a scale per 2048 numbers. The update comes from
the float momentum before that is rounded into codes again: only what the next step averages with
was rounded. A tensor takes codes if it has 4096 numbers or more, in whole blocks; others are small.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moonfx.optim.sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torchao's 4 bits and fp8 are not taken: with 4 the loss ended half as high again where with 8 it
# ended where floats do (tests/optim/state/test_low_bit.py's problem), and fp8 cannot be pickled.
BLOCKS = {"int8": 2048}
SMALLEST = 4096
MAP = 256  # numbers that a code may stand for, in float32


def zeros(p: Tensor, kind: str | None) -> Tensor:
    """A momentum of a parameter that has had no gradient: p's dtype, or codes where they fit."""
    if is_sharded(p):
        return _wrapped(zeros(p.to_local(), kind), p)
    if kind is None or why_not(p, kind):
        return torch.zeros_like(p, memory_format=torch.preserve_format)
    made: Tensor = _class().zeros(p.shape, True, BLOCKS[kind], p.device, p.dtype)
    return made


def stored(p: Tensor, momentum: Tensor, kind: str | None) -> Tensor:
    """A float momentum of a parameter as it is kept; itself where that is in floats."""
    if kind is None:
        return momentum
    local = p.to_local() if is_sharded(p) else p
    if why_not(local, kind):
        return momentum
    kept = zeros(p, kind)
    source = momentum.to_local() if is_sharded(momentum) else momentum
    target = kept.to_local() if is_sharded(kept) else kept
    write(target, source.float())
    return kept


def why_not(p: Tensor, kind: str) -> str | None:
    """Why a parameter's momentum stays in floats, None if it takes codes."""
    numbers, block = p.numel(), BLOCKS[kind]
    if numbers < SMALLEST:
        return f"its momentum stays in floats: {numbers} numbers are fewer than {SMALLEST}"
    if numbers % block:
        return f"its momentum stays in floats: {numbers} numbers are no whole blocks of {block}"
    return None


def size(p: Tensor, kind: str) -> int:
    """The bytes of a momentum of a parameter: a code each, a scale a block, the map; or floats."""
    if why_not(p, kind):
        return p.nbytes
    return p.numel() + 4 * (p.numel() // BLOCKS[kind]) + 4 * MAP


def has_codes(buffer: Tensor) -> bool:
    """Whether a momentum is of one of torchao's classes."""
    return hasattr(buffer, "codes")


def floats(buffer: Tensor) -> Tensor:
    """The numbers of a momentum that has codes."""
    made: Tensor = buffer.dequantize(torch.float32)  # type: ignore[call-arg]
    return made


def _wrapped(local: Tensor, p: "DTensor") -> "DTensor":
    return type(p).from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def write(buffer: Tensor, values: Tensor) -> None:
    """Rounds float32 values into a momentum that has codes.

    On a CPU torchao's own search, eight gathers and comparisons a number, took longer than the rest
    of the step. Here the upper half of a float's bits says the code but for one comparison: no two
    boundaries between codes share those bits.
    """
    if buffer.device.type != "cpu":
        buffer.copy_(values)
        return
    codes: Tensor = buffer.codes  # type: ignore[attr-defined]
    scale: Tensor = buffer.scale  # type: ignore[attr-defined]
    lowest, boundaries = _tables()
    blocks = values.reshape(len(scale), -1)
    torch.clamp(blocks.abs().amax(1), min=1e-12, out=scale)
    shares = (blocks / scale[:, None]).flatten()
    upper = shares.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    found = lowest.index_select(0, upper)
    found += shares >= boundaries.index_select(0, found)
    codes.view(-1).copy_(found)


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """The lowest code of each upper half of a float's bits, and the boundary above each code."""
    from torchao.optim.subclass_8bit import get_qmap_signed

    numbers = torch.tensor(get_qmap_signed())
    boundaries = (numbers[1:] + numbers[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    # Of a negative number more bits are further down.
    lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    codes = torch.bucketize(lowest, boundaries, right=True, out_int32=True)
    return codes, torch.cat((boundaries, torch.tensor([torch.inf])))


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
