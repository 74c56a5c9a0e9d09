"""The operator moonfx::newton_schulz: contract, and which kernel runs.

    moonfx::newton_schulz(X, coefficients, form="auto") -> like X, contiguous

    X <- a X + (b A + c A^2) X,  A = X X^T     for each (a, b, c) of the flattened coefficients

X is [m, n] or [b, m, n] and already normalized: singular values of at most about 1. Tall matrices
are computed as their transpose. It has no derivative.

    plain       three products a step, as they are written
    symmetric   half of X X^T and of A^2 is computed and mirrored
    gram        symmetric, and where that is precise enough, several steps between two visits of X
    auto        the one that the cost model takes for the device, dtype and shape

Where there is no kernel (no C++ compiler; float64) all of them are computed as the plain one.

The error, in Frobenius norm and relative to U diag(p(s)) V^T in float64, is at most this, on
Gaussian matrices, on spectra of 1 to 1e-6, of any rank, with a spike, and of norm 1 to 1.02. The
plain form's own, e, depends on the coefficients (Muon's, quintic, cubic, Polar Express', ten
steps'), and is larger where singular values vanish: rounding gives a matrix some in every
direction, and a step multiplies them by `a`.

                float32           float16            bfloat16
    plain       2e-6 to 4e-5      2e-3 to 3e-2       1e-2 to 0.3
      vanishing 4e-5 to 1e-2      1e-2 to 0.8        0.15 to 0.8
    symmetric   2 e + 2**-21      1.25 e + 2**-12    1.25 e + 2**-9
    gram        32 e + 2**-19     8 e + 2**-7        4 e + 2**-6

On a CPU float16, and bfloat16 where there is no AVX512-BF16, are computed in float32 and rounded
once. Polar Express' first step diverges from a singular value of 1 and more, in any form. NaN and
infinity make their own matrix NaN, and zeros stay zeros.

It is one node of an exported program, which needs moonfx imported where it is loaded.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients
from moonfx.kernels.cpu import newton_schulz as newton_schulz_cpu
from moonfx.kernels.reference.newton_schulz import JORDAN
from moonfx.kernels.torch_ops import newton_schulz as by_torch
from moonfx.ops import newton_schulz_runs
from moonfx.ops.checks import dtype_name, shape
from moonfx.ops.dispatch import triton_kernels
from moonfx.ops.flop_formulas import register_flop_formula
from moonfx.ops.newton_schulz_cost import (
    FORMS,
    best_form,
    kernel_runs,
    plain_flops,
    runs_of,
    worth_a_call,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def newton_schulz_form(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    m: int,
    n: int,
    steps: int,
    coefficients: Coefficients | None = None,
    calls: int = 1,
) -> tuple[str, str]:
    """What to compute [batch, m, n] in (either side may be the short one), and why.

    It is the form that "auto" takes, or "plain" where calling the operator at all is slower than
    the torch operations that it would replace.

    Args:
        coefficients: those of each step, on which the length of runs depends; by default Muon's.
        calls: in how many products each of a step's three is written: 1 where the batch is
            multiplied at once, `batch` where it is a loop over matrices.
    """
    size = (dtype, batch, min(m, n), max(m, n), coefficients or [JORDAN] * steps)
    form, why = best_form(device, *size)
    if form == "plain" or device.type != "cpu":
        return form, why
    reason = worth_a_call(form, *size, calls)
    return (form, why) if reason is None else ("plain", reason)


def newton_schulz_flops(
    m: int,
    n: int,
    steps: int,
    form: str = "plain",
    dtype: torch.dtype = torch.bfloat16,
    coefficients: Coefficients | None = None,
) -> int:
    """Of one matrix in a form that is not "auto"; a multiplication and an addition are two."""
    m, n = min(m, n), max(m, n)
    if form == "plain" or not m:
        return plain_flops(m, n, steps)
    return newton_schulz_runs.run_flops(
        m, n, runs_of(form, coefficients or [JORDAN] * steps, dtype, m, n)
    )


Steps = tuple[tuple[float, float, float], ...]


def check(X: Tensor, coefficients: Sequence[float], form: str) -> Steps:
    """The coefficients step by step.

    Raises:
        TypeError, ValueError: before any work, naming the argument at fault.
    """
    if X.dim() not in (2, 3):
        raise ValueError(f"X must be [m, n] or [batch, m, n], got {X.dim()} dims: {shape(X)}")
    if X.dtype not in DTYPES:
        names = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise TypeError(f"X must be one of {names}, got {dtype_name(X.dtype)}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    return per_step(tuple(coefficients))


@functools.lru_cache(maxsize=256)
def per_step(coefficients: tuple[float, ...]) -> Steps:
    """They are read once, for an optimizer gives the same ones at every step."""
    if not coefficients or len(coefficients) % 3:
        raise ValueError(
            "coefficients must be a, b, c of each step one after another, 3 or 6 or 9 ... numbers, "
            f"got {len(coefficients)}"
        )
    for number in coefficients:
        if not math.isfinite(number):
            raise ValueError(f"coefficients must be finite, got {number}")
    numbers = iter(coefficients)
    return tuple(zip(numbers, numbers, numbers, strict=True))


@torch.library.custom_op("moonfx::newton_schulz", mutates_args=())
def newton_schulz(X: Tensor, coefficients: Sequence[float], form: str = "auto") -> Tensor:
    steps = check(X, coefficients, form)
    if not X.numel():
        return X.new_empty(X.shape)
    if torch.is_autocast_enabled(X.device.type):  # it would cast the products of float32
        with torch.autocast(X.device.type, enabled=False):
            return by_short_side(X, steps, form)
    return by_short_side(X, steps, form)


def by_short_side(X: Tensor, steps: Steps, form: str) -> Tensor:
    batch = X.unsqueeze(0) if X.dim() == 2 else X
    tall = X.shape[-2] > X.shape[-1]
    out = run(batch.mT if tall else batch, steps, form)
    out = (out.mT if tall else out).contiguous()
    return out.squeeze(0) if X.dim() == 2 else out


def run(X: Tensor, steps: Steps, form: str) -> Tensor:
    """The steps of [b, m, n], m <= n."""
    B, m, n = X.shape
    if form != "plain" and not kernel_runs(X.device, X.dtype):
        form = "plain"
    if form == "auto":
        form, _ = best_form(X.device, X.dtype, B, m, n, steps)
    if form == "plain":
        return by_torch.plain(X, steps)
    runs = runs_of(form, steps, X.dtype, m, n)
    if triton_kernels(X.device) is not None:
        on_gpu = importlib.import_module("moonfx.kernels.gpu.newton_schulz")  # it needs Triton
        out: Tensor = on_gpu.newton_schulz(X, steps, runs)
        return out
    return newton_schulz_cpu.newton_schulz(X, steps, runs)


@newton_schulz.register_fake
def _(X: Tensor, coefficients: Sequence[float], form: str = "auto") -> Tensor:
    check(X, coefficients, form)
    return X.new_empty(X.shape)


def _no_derivative(ctx: Any, grad: Tensor) -> Tensor:
    raise RuntimeError(
        "moonfx::newton_schulz has no derivative: call it under torch.no_grad(), as an optimizer's "
        "step is"
    )


newton_schulz.register_autograd(_no_derivative)


@register_flop_formula(torch.ops.moonfx.newton_schulz, get_raw=True)
def operator_flops(
    X: Tensor, coefficients: Sequence[float], form: str = "auto", **named: Any
) -> int:
    """Of the form asked for; those of the plain one for "auto", which differs by device."""
    *batch, m, n = X.shape
    form = "plain" if form == "auto" else form
    steps = per_step(tuple(coefficients))
    return math.prod(batch) * newton_schulz_flops(m, n, len(steps), form, X.dtype, steps)
