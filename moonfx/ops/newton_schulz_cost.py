"""Which form of Newton-Schulz is the fastest, by device, dtype and shape, and why.

On a CPU the C++ kernel multiplies as fast as torch.mm (bfloat16 205 against 210 GFLOP/s, float32
103 against 100; 576 x 576 x 576 on one thread of an AMD EPYC with AVX512-BF16, torch 2.13), so that
the form with the fewest FLOPs is the fastest, where it saves more than the operator's call costs.
Where a processor has matrix units that torch.mm uses and the kernel does not (AMX), torch.mm is.

On a GPU nothing has been measured yet, so only what is clear is taken: the Triton kernel for 16-bit
numbers, from a short side of 256, where its tiles fill half of the chip and the arithmetic of waves
(gpu_waves.py) gives a gain; and runs of steps from a ratio of sides of 3.
"""

import functools

import torch

from moonfx.fallback import warn_slow
from moonfx.kernels.common.arguments import Coefficients
from moonfx.kernels.cpu import library
from moonfx.ops import gpu_waves, newton_schulz_runs
from moonfx.ops.dispatch import BACKENDS, find_triton_kernels, triton_kernels

FORMS = ("auto", "plain", "symmetric", "gram")

# A form with runs must save this much of the symmetric form's FLOPs: it is a little less precise.
WORTH = 0.95
# On a GPU: the shortest side, the least ratio of sides for runs, and the least gain by waves.
SHORTEST, RATIO, GAIN = 256, 3, 1.1
# On a CPU, in microseconds: a call of the operator; one of torch.mm, or of oneDNN, which multiplies
# bfloat16 beyond 16 x 16 x 16; what the kernel does for a matrix of any size; and at each visit for
# an entry of X, the first of which is far unless three copies of X fit the second-level cache.
# FLOPs are counted at a rate that few processors exceed, in every thread, so that what they save is
# more. The kernel multiplies whole registers, of 16 columns at most.
CALL, PRODUCT, ONEDNN, MATRIX = 30.0, 2.0, 15.0, 2.5
NEAR, FAR, CACHE, LANES = 1e-3, 1.75e-3, 1 << 20, 16
RATE = {torch.bfloat16: 200e3, torch.float32: 100e3, torch.float16: 100e3}


def best_form(
    device: torch.device, dtype: torch.dtype, batch: int, m: int, n: int, steps: Coefficients
) -> tuple[str, str]:
    """The operator's fastest form, and why, for [batch, m, n] with m <= n."""
    if not batch * m * n:
        return "plain", "there is nothing to compute"
    if (reason := no_kernel(device, dtype)) is not None:
        return "plain", reason
    steps = tuple(steps)
    if device.type == "cpu":
        return on_cpu(dtype, m, n, steps)
    return on_gpu(dtype, batch, m, n, steps, multiprocessors(device))


def on_cpu(
    dtype: torch.dtype, m: int, n: int, steps: tuple[tuple[float, float, float], ...]
) -> tuple[str, str]:
    if dtype == torch.bfloat16 and has_matrix_units():
        return "plain", "torch.mm has this processor's matrix units (AMX) for bfloat16"
    return fewest_flops(dtype, m, n, steps)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """An H100's where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def worth_a_call(
    form: str, dtype: torch.dtype, batch: int, m: int, n: int, steps: Coefficients, calls: int
) -> str | None:
    """Why the operator on a CPU would not be faster than the products it replaces; None if it is.

    Args:
        calls: in how many products each of a step's three is written.
    """
    runs = runs_of(form, steps, dtype, m, n)
    in_registers = (-(-m // LANES) * LANES, -(-n // LANES) * LANES)
    threads, product = torch.get_num_threads(), PRODUCT
    if dtype == torch.bfloat16 and m * m * n > 16**3 and multiplied_as_it_is(dtype):
        product = ONEDNN
    rate = RATE[dtype] * threads / batch
    written = len(steps) * 3 * calls * product + plain_flops(m, n, len(steps)) / rate
    first = NEAR if 3 * m * n * dtype.itemsize <= CACHE else FAR
    visits = first + (len(runs) - 1) * NEAR
    kernel = CALL + batch * (MATRIX + visits * m * n / threads)
    kernel += newton_schulz_runs.run_flops(*in_registers, runs) / rate
    if kernel <= written:
        return None
    return f"a call costs more than it saves: about {kernel:.0f} us, for {written:.0f} us"


def multiplied_as_it_is(dtype: torch.dtype) -> bool:
    """By the CPU kernel; elsewhere torch may have no oneDNN for it either."""
    return library.compute_dtype(library.load(), dtype) == dtype


def on_gpu(
    dtype: torch.dtype,
    batch: int,
    m: int,
    n: int,
    steps: tuple[tuple[float, float, float], ...],
    multiprocessors: int,
) -> tuple[str, str]:
    if dtype == torch.float32:
        return "plain", "float32 is left to cuBLAS (the kernel's products are not measured)"
    if m < SHORTEST:
        return "plain", f"the short side is below {SHORTEST} (not measured)"
    programs = gpu_waves.triangle(batch, m)
    chip = f"{multiprocessors} multiprocessors"
    if 2 * programs < multiprocessors:
        return "plain", f"{programs} tiles of 128 x 128 do not fill {chip} (not measured)"
    form, why = fewest_flops(dtype, m, n, steps)
    if form == "gram" and n < RATIO * m:
        form = "symmetric"
        why = f"the sides' ratio is below {RATIO}, for runs of steps (not measured)"
    gain = gpu_waves.gain(batch, m, n, runs_of(form, steps, dtype, m, n), multiprocessors)
    predicted = f"{gain:.2f} times as fast by the waves of tiles on {chip}, not measured"
    if gain < GAIN:
        return "plain", f"{form} would be {predicted}"
    return form, f"{why}; {predicted}"


def runs_of(
    form: str, coefficients: Coefficients, dtype: torch.dtype, m: int, n: int
) -> tuple[int, ...]:
    if form == "gram":
        return newton_schulz_runs.choose_runs(coefficients, dtype, m, n)
    return (1,) * len(coefficients)


@functools.lru_cache(maxsize=1024)
def fewest_flops(
    dtype: torch.dtype, m: int, n: int, steps: tuple[tuple[float, float, float], ...]
) -> tuple[str, str]:
    """Of the symmetric forms: "symmetric" or "gram", and what it saves."""
    plain = plain_flops(m, n, len(steps))
    runs = newton_schulz_runs.choose_runs(steps, dtype, m, n)
    alone = newton_schulz_runs.run_flops(m, n, (1,) * len(steps))
    together = newton_schulz_runs.run_flops(m, n, runs)
    if together > WORTH * alone:
        return "symmetric", f"{alone / plain:.2f} of the FLOPs: half of X X^T and of A^2"
    steps_at_once = " + ".join(map(str, runs))
    return "gram", f"{together / plain:.2f} of the FLOPs: {steps_at_once} steps between visits of X"


def plain_flops(m: int, n: int, steps: int) -> int:
    return steps * (4 * m * m * n + 2 * m**3)


def no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is none but torch's operations; None if there is one."""
    if dtype == torch.float64:
        return "float64 is computed by torch alone"
    if triton_kernels(device) is not None:
        return None
    if device.type == "cuda":
        return f"there is no Triton kernel: {find_triton_kernels()[1]}"
    if device.type != "cpu":
        return f"there is no kernel for {device.type} tensors"
    reason = library.available()
    return None if reason is None else f"there is no C++ kernel: {reason}"


def kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel; one that only lacks a compiler is warned about."""
    if (reason := no_kernel(device, dtype)) is None:
        return True
    if dtype != torch.float64 and device.type in BACKENDS:
        reason = reason.partition(": ")[2]
        backend = BACKENDS[device.type]
        what = f"Newton-Schulz on the {backend.where} runs as torch operations"
        warn_slow(f"{what}, slower than in {backend.language}", reason)
    return False


@functools.cache
def has_matrix_units() -> bool:
    return "amx_bf16" in library.processor()
