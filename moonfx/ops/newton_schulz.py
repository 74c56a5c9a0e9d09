"""The operator moonfx::newton_schulz: contract, and which form of it runs.

    moonfx::newton_schulz(X, coefficients, form="auto") -> like X, contiguous

    X <- a X + (b A + c A^2) X,  A = X X^T     for each (a, b, c) of the flattened coefficients

X is [m, n] or [b, m, n] and already normalized: singular values of at most about 1. Tall matrices
are computed as their transpose. It has no derivative.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moonfx.kernels import newton_schulz as kernel
from moonfx.kernels.reference_newton_schulz import Coefficients
from moonfx.ops.checks import dtype_name, shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = ("auto", "plain", "symmetric", "gram")


def newton_schulz_form(
    device: torch.device, dtype: torch.dtype, batch: int, m: int, n: int, steps: int
) -> tuple[str, str]:
    """The form that "auto" takes for [batch, m, n] (either side may be the short one), and why."""
    return "plain", "the only form so far"


def newton_schulz_flops(m: int, n: int, steps: int, form: str = "plain") -> int:
    """Of one matrix; a multiplication and an addition are two."""
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * n + 2 * m**3)


def check(X: Tensor, coefficients: Sequence[float], form: str) -> None:
    """Raises TypeError or ValueError before any work, naming the argument at fault."""
    if X.dim() not in (2, 3):
        raise ValueError(f"X must be [m, n] or [batch, m, n], got {X.dim()} dims: {shape(X)}")
    if X.dtype not in DTYPES:
        names = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise TypeError(f"X must be one of {names}, got {dtype_name(X.dtype)}")
    if not coefficients or len(coefficients) % 3:
        raise ValueError(
            "coefficients must be a, b, c of each step one after another, 3 or 6 or 9 ... numbers, "
            f"got {len(coefficients)}"
        )
    for number in coefficients:
        if not math.isfinite(number):
            raise ValueError(f"coefficients must be finite, got {number}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")


def per_step(coefficients: Sequence[float]) -> Coefficients:
    numbers = iter(coefficients)
    return list(zip(numbers, numbers, numbers, strict=True))


@torch.library.custom_op("moonfx::newton_schulz", mutates_args=())
def newton_schulz(X: Tensor, coefficients: Sequence[float], form: str = "auto") -> Tensor:
    check(X, coefficients, form)
    if not X.numel():
        return X.new_empty(X.shape)
    with torch.autocast(X.device.type, enabled=False):
        batch = X.unsqueeze(0) if X.dim() == 2 else X
        tall = X.shape[-2] > X.shape[-1]
        out = kernel.plain(batch.mT if tall else batch, per_step(coefficients))
    return (out.mT if tall else out).contiguous().view(X.shape)


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


@register_flop_formula(torch.ops.moonfx.newton_schulz)
def flops(  # type: ignore[no-untyped-def]
    shape, coefficients, form="auto", *rest, **named
) -> int:
    """Of the form asked for; those of the plain one for "auto", which differs by device."""
    *batch, m, n = shape
    form = "plain" if form == "auto" else form
    return math.prod(batch) * newton_schulz_flops(m, n, len(coefficients) // 3, form)
