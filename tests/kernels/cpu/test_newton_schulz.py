"""The C++ Newton-Schulz and the plain form against the singular values' own map in float64.

Plain steps are as precise as their dtype lets them be: rounding gives a matrix of low rank small
singular values that it did not have, and those grow by every step's `a`. So each other form is
measured by the plain one on the same matrix.
"""

import math

import pytest
import torch

from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import newton_schulz as newton_schulz_cpu
from moonfx.kernels.reference import newton_schulz as reference
from moonfx.kernels.torch_ops import newton_schulz
from moonfx.ops import newton_schulz_runs as runs_
from tests.support.newton_schulz_cases import (
    CASES,
    COEFFICIENTS,
    GRAM,
    SYMMETRIC,
    error,
    matrix,
    tolerance,
)
from tests.support.newton_schulz_cpu import (
    DTYPES,
    OPERATOR,
    QUINTIC,
    cpu_kernel,
    needs_kernel,
)


def check_each_form(name: str, kind: str, dtype: torch.dtype, norm: float) -> None:
    steps = COEFFICIENTS[name]
    X = matrix(kind, 48, 128, dtype, norm)
    expected = reference.by_singular_values(X.double(), steps)
    plain = error(newton_schulz.plain(X.unsqueeze(0), steps)[0], expected)
    assert plain <= tolerance(name, kind, dtype)
    if cpu_build.available() is None:
        factor, more = SYMMETRIC[dtype]
        assert error(cpu_kernel(X, name, (1,) * len(steps)), expected) <= factor * plain + more
        factor, more = GRAM[dtype]
        runs = runs_.choose_runs(steps, dtype, 48, 128)
        assert error(cpu_kernel(X, name, runs), expected) <= factor * plain + more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_form_is_as_precise_as_it_says(name: str, kind: str, dtype: torch.dtype) -> None:
    check_each_form(name, kind, dtype, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "rank 1", "spike", "1 on the diagonal"])
@pytest.mark.parametrize("name", ["muon", "quintic", "cubic", "ten steps"])
def test_a_norm_a_little_above_one_is_no_less_precise(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """Rounding leaves a matrix of rank 1 with a singular value just above 1; 1.02 is dion's own.
    The first step of Polar Express diverges from there (DIVERGENT), and that is its authors'."""
    check_each_form(name, kind, dtype, 1.02)


@pytest.mark.parametrize("form", ["plain", "symmetric", "gram"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_float16_is_computed_in_float32_and_rounded_once(name: str, kind: str, form: str) -> None:
    """On a CPU. float32's own error, in runs at most 32 times, and half a bit of float16."""
    X = matrix(kind, 24, 40, torch.float16)
    flat = [number for step in COEFFICIENTS[name] for number in step]
    expected = reference.by_singular_values(X.double(), COEFFICIENTS[name])
    limit = 2 * tolerance(name, kind, torch.float32) + 2**-11
    assert error(OPERATOR(X, flat, form), expected) <= limit


@pytest.mark.parametrize("form", ["plain", "symmetric", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_too_small_to_be_normal_are_only_multiplied(dtype: torch.dtype, form: str) -> None:
    """Their products vanish, and X <- a X is all that is left of a step. What multiplies bfloat16
    may read them as zeros."""
    X = (matrix("gaussian", 20, 30, torch.float64) * 1e-38).to(dtype)
    flat = [number for step in QUINTIC for number in step]
    expected = X.double() * math.prod(step[0] for step in QUINTIC)
    out = OPERATOR(X, flat, form)
    assert error(out, expected) < 0.02 or (dtype == torch.bfloat16 and out.eq(0).all())


@pytest.mark.parametrize("form", ["plain", "symmetric", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_matrix(
    dtype: torch.dtype, form: str
) -> None:
    X = torch.zeros(4, 20, 30, dtype=dtype)
    X[1] = matrix("gaussian", 20, 30, dtype)
    X[2, 3, 4], X[3, 3, 4] = math.nan, math.inf
    flat = [number for step in QUINTIC for number in step]
    out = OPERATOR(X, flat, form)
    assert out[0].eq(0).all()
    assert out[1].equal(OPERATOR(X[1], flat, form))
    assert not out[2].isfinite().any()
    assert not out[3].isfinite().any()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(130, 200), (1, 300), (64, 64), (7, 65)])
def test_neither_threads_nor_batch_nor_layout_change_a_bit(
    m: int, n: int, dtype: torch.dtype
) -> None:
    X = torch.stack([matrix(kind, m, n, dtype) for kind in ("gaussian", "spike", "diagonal")])
    runs = (2, 1, 2)
    expected = torch.stack([cpu_kernel(each, "quintic", runs) for each in X])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for batch in (X, X.mT.contiguous().mT, X.expand(2, 3, m, n)[1]):
                assert newton_schulz_cpu.newton_schulz(batch, QUINTIC, runs).equal(expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 4101), (torch.float32, 2050)], ids=str)
def test_a_long_side_is_summed_to_its_end(dtype: torch.dtype, n: int) -> None:
    """Beyond 1024 words the kernel takes the depth in pieces."""
    X = matrix("gaussian", 5, n, dtype)
    expected = reference.by_singular_values(X.double(), QUINTIC)
    plain = error(newton_schulz.plain(X.unsqueeze(0), QUINTIC)[0], expected)
    assert error(cpu_kernel(X, "quintic", (1,) * 5), expected) < 1.5 * plain + 2**-20
