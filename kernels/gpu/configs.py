"""Tile shapes of the GPU kernels: a small table, so that few variants of a kernel ever compile.

A row gives a kernel's tile for a width of the numbers, a block size and a chip, by head dim. Each
of these is a bucket, so nothing here depends on how long a sequence is. `tests/support/aot.py`
compiles what every row launches, and says its registers, spills and shared memory.

MOONFX_AUTOTUNE=1 lets `launch` measure a row's neighbours once per shape class, as
`@triton.autotune` does, and use the fastest.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

DIMS = (64, 128, 256, 512)
BLOCKS = (16, 32, 64, 256)  # at most this many keys, and beyond; a tile spans no more keys
# Bytes of shared memory that a program may have.
ARCHITECTURES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
INTERPRETER = "interpreter"

# rows x keys / warps / stages, by head dim (the larger of D and Dv): the first row that fits. One
# with a + is for calls with extras: a bias, a softcap, gathered keys.
# means: keys of a block in a step x dims. route: rows x block means. merge, delta: rows of a
# program. small: forward's, where a block is one step of keys. dkdv: rows of a step x keys of a
# program.
TABLE = """
kernel   bytes  block  chip         <=64         <=128        <=256        <=512
means    any    any    any          64x64/4/2    64x128/4/2   32x256/4/2   32x512/8/2
route+   2      any    sm_100       64x64/8/2    64x32/8/2    32x32/4/2    16x32/4/2
route+   2      any    any          64x32/8/2    64x32/8/2    32x32/4/2    16x32/4/2
route    2      any    gfx942       64x32/4/2    64x32/4/2    32x32/4/2    16x16/4/1
route    2      any    sm_90        64x64/4/3    64x64/4/2    64x32/4/2    32x32/8/2
route    2      any    sm_100       64x64/8/3    64x64/8/2    64x32/8/2    32x32/8/2
route    2      any    sm_86        64x64/4/3    64x32/4/2    64x32/4/1    32x32/8/1
route    2      any    any          64x64/4/3    64x32/4/2    64x32/4/2    32x32/8/2
route    4      any    sm_90        64x64/4/2    64x32/4/2    32x32/4/2    16x32/4/2
route    4      any    sm_100       64x64/8/2    64x32/4/2    32x32/4/2    16x32/4/2
route    4      any    sm_86        64x32/4/2    64x32/4/2    32x32/4/1    16x32/4/1
route    4      any    any          64x32/4/2    64x32/4/2    32x32/4/2    16x32/4/2
forward+ 2      any    gfx942       128x32/4/1   128x32/8/1   64x16/4/1    16x16/4/1
forward+ 2      any    sm_86        128x32/8/2   64x32/8/2    64x16/4/1    16x16/4/1
forward+ 2      any    any          128x64/8/3   128x32/8/3   64x32/4/2    32x32/8/1
forward  2      any    sm_80        128x64/8/3   128x32/8/3   64x64/8/2    32x32/4/2
forward  2      any    sm_86        128x64/4/2   128x32/8/2   64x32/4/2    16x32/4/1
forward  2      any    gfx942       128x64/4/2   128x64/8/1   64x32/4/1    16x32/4/1
forward  2      any    sm_100       128x64/4/3   128x64/8/3   64x64/4/2    64x32/8/2
forward  2      any    sm_90        128x128/8/3  128x128/8/3  128x64/8/2   64x32/8/2
forward+ 4      any    sm_86        16x32/4/2    16x32/4/2    16x16/4/1    16x16/4/1
forward+ 4      any    any          32x32/4/3    16x32/4/2    16x16/4/2    16x16/4/2
forward  4      any    sm_86        32x32/4/2    16x32/4/2    16x16/4/1    16x16/4/1
forward  4      any    gfx942       32x32/4/1    16x32/4/1    16x16/4/1    16x16/4/1
forward  4      any    sm_90        64x32/4/2    16x32/4/1    16x32/4/2    16x16/4/2
forward  4      any    any          32x32/4/2    16x32/4/2    16x16/4/2    16x16/4/2
small+   2      any    any          64x128/4/3   64x64/4/2    64x16/4/2    32x16/4/2
small    2      any    any          64x128/4/3   64x128/4/3   64x32/4/2    32x16/4/2
dkdv+    2      any    any          64x64/8/2    32x64/8/2    32x32/8/1    16x32/8/1
dkdv     2      any    sm_80        64x64/4/2    64x64/8/2    32x64/8/1    16x32/8/1
dkdv     2      any    sm_86        64x64/4/2    32x64/4/1    32x32/4/1    16x16/4/1
dkdv     2      any    gfx942       64x64/4/1    32x64/4/1    16x32/4/1    16x16/4/1
dkdv     2      any    sm_90        64x128/8/3   64x128/8/3   32x64/8/2    32x32/8/1
dkdv     2      any    any          64x128/8/2   64x128/8/2   32x64/8/2    32x32/8/1
dkdv     4      any    gfx942       32x32/4/1    16x32/4/1    16x16/4/1    16x16/4/1
dkdv     4      any    sm_86        16x32/4/1    16x32/8/1    16x16/8/1    16x16/8/1
dkdv     4      any    any          16x64/4/1    16x32/8/1    16x16/8/1    16x16/8/1
dq+      2      any    any          128x64/8/2   128x32/8/2   64x32/8/1    32x32/8/1
dq       2      any    sm_80        128x64/8/2   64x64/8/2    64x32/8/1    16x32/8/1
dq       2      any    sm_86        64x64/4/2    64x32/4/2    32x32/4/1    16x16/4/1
dq       2      any    gfx942       64x64/4/1    64x32/4/1    32x32/4/1    16x16/4/1
dq       2      any    sm_90        128x64/8/2   128x64/8/2   64x32/8/2    32x32/8/1
dq       2      any    any          128x64/8/2   128x64/8/2   64x64/8/1    32x32/8/1
dq       4      any    gfx942       32x32/4/1    32x16/4/1    16x16/4/1    16x16/4/1
dq       4      any    sm_86        32x32/4/1    32x16/8/1    16x16/8/1    16x16/8/1
dq       4      any    any          64x32/4/2    32x16/8/1    16x16/8/1    16x16/8/1
merge    any    any    any          16x1/4/1     16x1/4/1     8x1/4/1      4x1/4/1
delta    any    any    any          32x1/4/1     32x1/4/1     16x1/4/1     8x1/4/1
decode+  2      any    gfx942       16x32/4/2    16x32/4/2    16x32/4/1    16x16/4/1
decode+  2      any    any          64x64/8/3    32x64/8/3    32x32/8/3    16x32/8/2
decode   2      any    gfx942       64x32/4/2    64x32/4/2    32x32/4/2    16x16/4/2
decode   2      any    sm_80        64x64/4/3    32x64/4/3    64x32/8/3    16x32/8/2
decode   2      any    sm_86        64x64/4/2    64x64/4/2    32x32/4/2    16x16/8/2
decode   2      any    any          64x64/4/3    64x64/4/3    64x32/8/3    16x32/8/2
decode   4      any    gfx942       16x32/4/2    16x32/4/2    16x16/4/1    16x16/8/1
decode   4      any    sm_86        16x32/4/2    16x32/4/1    16x16/8/1    16x16/8/1
decode   4      any    any          32x32/8/2    16x32/4/2    16x16/8/1    16x16/8/1
"""


class Config(NamedTuple):
    """block_m rows by block_n keys in a tile, and Triton's num_warps and num_stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """A shape class: the largest head dim and block of its buckets (beyond the last: twice it)."""

    dim: int
    dtype: torch.dtype
    block: int
    extras: bool


def choose(
    kernel: str,
    dim: int,
    dtype: torch.dtype,
    block: int,
    device: torch.device | None = None,
    extras: bool = False,
) -> Config:
    """The configuration of `kernel` for a head dim (the larger of D and Dv), dtype and block.

    Args:
        extras: scores have a bias or a softcap, or keys are gathered: that takes registers.
    """
    size, chip = _bucket(dim, DIMS), architecture(device)
    return _look_up(kernel, size, dtype.itemsize, _bucket(block, BLOCKS), chip, extras)


def every(kernel: str, chip: str) -> Iterator[tuple[Shape, Config]]:
    """Each shape class that `choose` tells apart on `chip`, and what it answers."""
    blocks = (*BLOCKS, 2 * BLOCKS[-1])
    for dim, dtype, block in itertools.product(DIMS, (torch.bfloat16, torch.float32), blocks):
        bucket = _bucket(block, BLOCKS)
        for extras in (False, True):
            config = _look_up(kernel, dim, dtype.itemsize, bucket, chip, extras)
            yield Shape(dim, dtype, block, extras), config


@functools.cache
def architecture(device: torch.device | None = None) -> str:
    """One of ARCHITECTURES by the device's capability; INTERPRETER where tensors are not on one."""
    if (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # What divides them is shared memory and the matrix instruction, not the name: 12.x is a
    # consumer chip, with 8.6's.
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]],
    config: Config,
    *arguments: object,
    tune: tuple[str, ...] = (),
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants) with the warps and stages of `config`.

    Args:
        tune: the constants that MOONFX_AUTOTUNE=1 may halve and double; warps and stages it always
            tries. Every try computes the whole result, and `grid` is asked again for each.
    """
    if os.environ.get("MOONFX_AUTOTUNE") == "1" and architecture() != INTERPRETER:
        fixed = {name: value for name, value in constants.items() if name not in tune}
        tuned = {name: constants[name] for name in tune}
        tuner = _tuner(kernel, config, tuple(fixed.items()), tuple(tuned.items()))
        tuner[grid](*arguments, **fixed)
        return
    kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)


@functools.cache
def _tuner(kernel: Any, config: Config, fixed: tuple[Any, ...], tuned: tuple[Any, ...]) -> Any:
    """An autotuner for each set of constants: lengths, which are arguments, have no say."""
    import triton

    del fixed
    sizes = [
        [size for size in (value // 2, value, value * 2) if 16 <= size <= 256] or [value]
        for _, value in tuned
    ]
    tries = itertools.product((4, 8), range(1, config.stages + 2), *sizes)
    return triton.autotune(
        [
            triton.Config(dict(zip(dict(tuned), tile)), num_warps=warps, num_stages=stages)
            for warps, stages, *tile in tries
        ],
        key=[],
    )(kernel)


def _bucket(size: int, edges: tuple[int, ...]) -> int:
    """The first of `edges` that holds `size`; twice the last where none does."""
    return next((edge for edge in edges if size <= edge), 2 * edges[-1])


@functools.cache
def _look_up(kernel: str, dim: int, width: int, block: int, chip: str, extras: bool) -> Config:
    if chip == INTERPRETER:
        rows, keys, warps, stages = 32, 32, 4, 1
    else:
        rows, keys, warps, stages = _tile(kernel, min(dim, DIMS[-1]), width, block, chip, extras)
    if kernel in ("forward", "small", "dkdv", "dq", "decode"):
        keys = min(keys, max(16, block))
    return Config(rows, keys, warps, stages)


def _tile(
    kernel: str, dim: int, width: int, block: int, chip: str, extras: bool
) -> tuple[int, int, int, int]:
    size = "small" if block <= BLOCKS[-1] else "large"
    names = (kernel, f"{kernel}+") if extras else (kernel,)
    for line in TABLE.strip().splitlines()[1:]:
        name, *row = line.split()
        fits = all(cell in ("any", want) for cell, want in zip(row, (str(width), size, chip)))
        if name in names and fits:
            tile, warps, stages = row[3 + DIMS.index(dim)].split("/")
            rows, keys = tile.split("x")
            return int(rows), int(keys), int(warps), int(stages)
    raise KeyError(f"no row for {kernel}, {width} bytes, {size} block, {chip}")
