"""Which form of Newton-Schulz is the fastest, by device, dtype and shape, and why.

On a CPU the C++ kernel multiplies as fast as torch.mm (bfloat16 205 against 210 GFLOP/s, float32
103 against 100; 576 x 576 x 576 on one thread of an AMD EPYC with AVX512-BF16, torch 2.13), so that
the form with the fewest FLOPs is the fastest. Where a processor has matrix units that torch.mm uses
and the kernel does not (AMX), torch.mm is.

On a GPU nothing has been measured yet.
"""

import functools

import torch

from moonfx.fallback import warn_slow
from moonfx.kernels import cpu, cpu_build, newton_schulz_runs
from moonfx.kernels.reference_newton_schulz import Coefficients

FORMS = ("auto", "plain", "symmetric", "gram")
MUON = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, of every step

# A form with runs must save this much of the symmetric form's FLOPs: it is a little less precise.
WORTH = 0.95


def best_form(
    device: torch.device, dtype: torch.dtype, batch: int, m: int, n: int, steps: Coefficients
) -> tuple[str, str]:
    """The form, and why, for [batch, m, n] with m <= n."""
    if not batch * m * n:
        return "plain", "there is nothing to compute"
    if (reason := no_kernel(device, dtype)) is not None:
        return "plain", reason
    if dtype == torch.bfloat16 and has_matrix_units():
        return "plain", "torch.mm has this processor's matrix units (AMX) for bfloat16"
    return fewest_flops(dtype, m, n, steps)


def fewest_flops(dtype: torch.dtype, m: int, n: int, steps: Coefficients) -> tuple[str, str]:
    """Of the symmetric forms: "symmetric" or "gram", and what it saves."""
    plain = len(steps) * (4 * m * m * n + 2 * m**3)
    runs = newton_schulz_runs.choose(steps, dtype, m, n)
    alone = newton_schulz_runs.flops(m, n, (1,) * len(steps))
    together = newton_schulz_runs.flops(m, n, runs)
    if together > WORTH * alone:
        return "symmetric", f"{alone / plain:.2f} of the FLOPs: half of X X^T and of A^2"
    said = " + ".join(map(str, runs))
    return "gram", f"{together / plain:.2f} of the FLOPs: {said} steps between visits of X"


def no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is none but torch's operations; None if there is one."""
    if dtype == torch.float64:
        return "float64 is computed by torch alone"
    if device.type != "cpu":
        return f"there is no kernel for {device.type} tensors"
    reason = cpu.available()
    return None if reason is None else f"there is no C++ kernel: {reason}"


def kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel; one that only lacks a compiler is warned about."""
    if no_kernel(device, dtype) is None:
        return True
    if device.type == "cpu" and (reason := cpu.available()) is not None:
        warn_slow("Newton-Schulz on the CPU runs as torch operations, slower than in C++", reason)
    return False


@functools.cache
def has_matrix_units() -> bool:
    return "amx_bf16" in cpu_build.processor()
