"""How fast a machine can go at most: a matrix product, a copy, an exponential."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moonfx.bench.harness import machine
from moonfx.bench.harness.arguments import DTYPES


class Ceilings(NamedTuple):
    """Rates of one machine.

    Args:
        device: "cpu" or "cuda", whose kernels would run.
        flops: FLOP/s of a matrix product by dtype, float32's among them. On a GPU float32 is a
            third of the rate of tf32: three of its products make one that is exact enough.
        copy: bytes read and written per second.
        exps: exponentials per second; 0 where they are not counted.
        source: where the numbers are from.
    """

    device: str
    flops: dict[str, float]
    copy: float
    exps: float
    source: str


# The bfloat16 product and the copy: as torch 2.11 reaches them on an H100 SXM. tf32: 494.7 TFLOP/s
# in NVIDIA's data sheet. exps: FlashAttention-3 (arXiv 2407.08608), section 3.1.
PUBLISHED = {
    "h100": Ceilings(
        "cuda",
        {"bfloat16": 798e12, "float16": 798e12, "float32": 494.7e12 / 3},
        3.0e12,
        3.9e12,
        "published ceilings of an H100 SXM",
    )
}


def measure(device: torch.device, dtypes: set[str]) -> Ceilings:
    """The best of a few turns of each."""
    gpu = device.type == "cuda"
    flops = {name: product_rate(name, device) for name in sorted(dtypes | {"float32"})}
    source = torch.ones(1 << 30 if gpu else 1 << 27, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    copy = 2 * source.numel() / best(lambda: copied.copy_(source), device)
    exps = 0.0
    if gpu:  # 16 a clock on each multiprocessor, since Volta
        properties = torch.cuda.get_device_properties(device)
        clock = 1e3 * getattr(properties, "clock_rate", 1.7e6)
        exps = 16 * properties.multi_processor_count * clock
    return Ceilings(device.type, flops, copy, exps, "ceilings measured in this run")


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher of each rate, of two measurements of one machine."""
    flops = {name: max(rate, other.flops[name]) for name, rate in one.flops.items()}
    return one._replace(flops=flops, copy=max(one.copy, other.copy))


def product_rate(dtype: str, device: torch.device) -> float:
    """FLOP/s; a square whose operands stay in a CPU's last-level cache."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    exact = gpu and dtype == "float32"
    square = torch.randn(size, size, device=device).to(DTYPES[dtype])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if exact else before)
    try:
        spent = best(lambda: square @ square, device)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / spent / (3 if exact else 1)


def best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten turns."""
    return min(machine.seconds(call, device) for _ in range(10))
