"""The forms of Newton-Schulz against the singular values' own map in float64, and on the CPU.

Plain steps are as precise as their dtype lets them be: rounding gives a matrix of low rank small
singular values that it did not have, and those grow by every step's `a`. So each other form is
measured by the plain one on the same matrix.
"""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor

from moonfx import fallback
from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import newton_schulz as newton_schulz_cpu
from moonfx.kernels.reference import newton_schulz as reference
from moonfx.kernels.torch_ops import newton_schulz
from moonfx.ops import newton_schulz_cost
from moonfx.ops import newton_schulz_runs as runs_
from moonfx.ops.newton_schulz import newton_schulz_flops, newton_schulz_form
from tests.support.newton_schulz_cases import (
    CASES,
    COEFFICIENTS,
    GRAM,
    SYMMETRIC,
    error,
    matrix,
    tolerance,
)

OPERATOR = torch.ops.moonfx.newton_schulz
CPU = torch.device("cpu")
QUINTIC = COEFFICIENTS["quintic"]
DTYPES = (torch.bfloat16, torch.float32)

needs_kernel = pytest.mark.skipif(
    cpu_build.available() is not None, reason="needs a C++ compiler for the CPU kernel"
)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU kernel rounds to `dtype` between products: it may compute in float32."""
    return (
        cpu_build.available() is None and cpu_build.compute_dtype(cpu_build.load(), dtype) == dtype
    )


def cpu_kernel(X: Tensor, name: str, runs: tuple[int, ...]) -> Tensor:
    return newton_schulz_cpu.newton_schulz(X.unsqueeze(0), COEFFICIENTS[name], runs)[0]


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
        runs = runs_.choose(steps, dtype, 48, 128)
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


@pytest.mark.skipif(
    not multiplies(torch.bfloat16), reason="needs AVX512-BF16 and a compiler: nothing else rounds"
)
@pytest.mark.parametrize(
    ("name", "kind", "runs"),
    [
        ("quintic", "spike", (3, 2)),
        ("quintic", "rank 12", (1, 3, 1)),
        ("polar express", "spike", (3, 2)),
        ("polar express", "spectrum 1..1e-3", (1, 3, 1)),
        ("ten steps", "spectrum 1..1e-3", (3, 3, 2, 2)),
    ],
)
def test_runs_that_are_not_chosen_for_bfloat16_are_bad_where_a_gaussian_matrix_is_well(
    name: str, kind: str, runs: tuple[int, ...]
) -> None:
    assert runs != runs_.choose(COEFFICIENTS[name], torch.bfloat16, 48, 128)
    errors = []
    for each in ("gaussian", kind):
        X = matrix(each, 48, 128, torch.bfloat16)
        expected = reference.by_singular_values(X.double(), COEFFICIENTS[name])
        factor, more = GRAM[torch.bfloat16]
        plain = error(newton_schulz.plain(X.unsqueeze(0), COEFFICIENTS[name])[0], expected)
        errors.append(error(cpu_kernel(X, name, runs), expected) / (factor * plain + more))
    assert errors[0] < 1
    assert not errors[1] < 1  # NaN too


CHOSEN = [
    # coefficients   bfloat16          float32
    ("muon", (2, 1, 2), (3, 2)),
    ("quintic", (2, 1, 2), (2, 3)),
    ("polar express", (1, 1, 1, 2), (2, 3)),
    ("cubic", (1, 2, 2), (2, 3)),
    ("ten steps", (2, 2, 2, 2, 2), (2, 3, 3, 2)),
]


@pytest.mark.parametrize(("name", "bfloat16", "float32"), CHOSEN, ids=[row[0] for row in CHOSEN])
def test_runs_are_as_long_as_the_coefficients_allow(
    name: str, bfloat16: tuple[int, ...], float32: tuple[int, ...]
) -> None:
    for dtype, expected in zip(DTYPES, (bfloat16, float32), strict=True):
        assert runs_.choose(COEFFICIENTS[name], dtype, 100, 300) == expected


def test_more_steps_than_anyone_takes_are_single_ones_and_chosen_at_once() -> None:
    steps = COEFFICIENTS["muon"][:1] * 200
    assert runs_.choose(steps, torch.float32, 64, 256) == (1,) * 200


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


FORMS = [
    # device, dtype, m, n, steps of, form, why
    ("cpu", torch.bfloat16, 576, 576, "muon", "symmetric", "0.67 of the FLOPs: half of X X^T"),
    ("cpu", torch.bfloat16, 192, 576, "muon", "gram", "0.54 of the FLOPs: 2 + 1 + 2 steps"),
    ("cpu", torch.bfloat16, 192, 576, "polar express", "gram", "1 + 1 + 1 + 2 steps"),
    ("cpu", torch.float32, 576, 1536, "muon", "gram", "0.47 of the FLOPs: 3 + 2 steps"),
    ("cpu", torch.float64, 576, 1536, "muon", "plain", "float64 is computed by torch alone"),
    ("cpu", torch.float32, 0, 1536, "muon", "plain", "there is nothing to compute"),
    ("meta", torch.float32, 576, 1536, "muon", "plain", "there is no kernel for meta tensors"),
]


@needs_kernel
@pytest.mark.parametrize(("device", "dtype", "m", "n", "name", "form", "why"), FORMS)
def test_the_form_with_the_fewest_flops_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    name: str,
    form: str,
    why: str,
) -> None:
    monkeypatch.setattr(newton_schulz_cost, "has_matrix_units", lambda: False)
    where, steps = torch.device(device), COEFFICIENTS[name]
    for sides in ((m, n), (n, m)):
        found = newton_schulz_form(where, dtype, 2, *sides, len(steps), steps)
        assert found[0] == form
        assert why in found[1]
    flops = [newton_schulz_flops(m, n, 5, each, dtype, steps) for each in (form, "plain")]
    assert flops[0] == pytest.approx(flops[1]) or re.match(
        f"{flops[0] / flops[1]:.2f} of the FLOPs", found[1]
    )


SMALL = [
    # dtype, matrices, m, n, steps, calls, form
    (torch.float32, 1, 64, 64, 5, 1, "symmetric"),
    (torch.bfloat16, 1, 64, 64, 5, 1, "symmetric"),
    (torch.float32, 1, 64, 1024, 5, 1, "gram"),
    (torch.float32, 8, 64, 64, 5, 1, "symmetric"),
    # One call of the operator is as long as fifteen of torch.mm.
    (torch.float32, 1, 32, 32, 1, 1, "plain"),
    (torch.float32, 1, 64, 64, 1, 1, "plain"),
    (torch.float32, 1, 160, 160, 1, 1, "symmetric"),
    # Of a batch of products there are no more calls than of one, but the kernel has eight matrices.
    (torch.float32, 8, 4, 4, 5, 8, "symmetric"),
    (torch.float32, 8, 4, 4, 5, 1, "plain"),
    (torch.bfloat16, 8, 4, 4, 5, 1, "plain"),
    # oneDNN, which multiplies bfloat16 beyond 16 x 16 x 16, takes longer to call.
    (torch.bfloat16, 1, 16, 16, 2, 1, "plain"),
    (torch.bfloat16, 1, 24, 24, 2, 1, "symmetric"),
    # A single row is one register of columns wide, most of it padding.
    (torch.float32, 1, 1, 4096, 5, 1, "plain"),
    # X comes from beyond the second-level cache at its first visit, which several steps pay for.
    (torch.float32, 1, 200, 3200, 1, 1, "plain"),
    (torch.bfloat16, 1, 128, 2048, 1, 1, "plain"),
    (torch.bfloat16, 1, 128, 2048, 5, 1, "gram"),
    (torch.bfloat16, 1, 64, 8192, 5, 1, "gram"),
    (torch.float32, 1, 200, 3200, 5, 1, "gram"),
]


@needs_kernel
@pytest.mark.parametrize(("dtype", "batch", "m", "n", "steps", "calls", "form"), SMALL)
def test_what_a_call_would_make_slower_is_left(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    batch: int,
    m: int,
    n: int,
    steps: int,
    calls: int,
    form: str,
) -> None:
    monkeypatch.setattr(newton_schulz_cost, "has_matrix_units", lambda: False)
    monkeypatch.setattr(newton_schulz_cost, "multiplied_as_it_is", lambda dtype: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found, why = newton_schulz_form(CPU, dtype, batch, m, n, steps, None, calls)
    assert found == form
    assert ("costs more than it saves" in why) == (form == "plain")


@needs_kernel
def test_more_threads_leave_more_to_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = []
    for threads in (1, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        forms.append(newton_schulz_form(CPU, torch.float32, 1, 160, 160, 1)[0])
    assert forms == ["symmetric", "plain"]


@needs_kernel
def test_bfloat16_is_left_to_matrix_units_that_only_torch_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newton_schulz_cost.has_matrix_units.cache_clear()
    flags = "flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile"
    monkeypatch.setattr(cpu_build, "processor", lambda: flags)
    form, why = newton_schulz_form(CPU, torch.bfloat16, 1, 576, 576, 5)
    assert (form, "AMX" in why) == ("plain", True)
    assert newton_schulz_form(CPU, torch.float32, 1, 576, 576, 5)[0] == "symmetric"
    newton_schulz_cost.has_matrix_units.cache_clear()
    monkeypatch.setattr(cpu_build, "processor", lambda: flags.replace(" amx_bf16", ""))
    assert newton_schulz_form(CPU, torch.bfloat16, 1, 576, 576, 5)[0] == "symmetric"
    monkeypatch.undo()
    newton_schulz_cost.has_matrix_units.cache_clear()


@pytest.mark.parametrize("form", ["auto", "symmetric", "gram"])
def test_without_a_compiler_it_is_right_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(cpu_build, "available", lambda: "switched off by a test")
    fallback.forget()
    X = matrix("spike", 24, 40, torch.float32)
    flat = [number for step in QUINTIC for number in step]
    with pytest.warns(RuntimeWarning, match="slower than in C.*: switched off by a test"):
        out = OPERATOR(X, flat, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPERATOR(X, flat, form).equal(out)
    fallback.forget()
    assert out.equal(OPERATOR(X, flat, "plain"))
    form, why = newton_schulz_form(CPU, torch.float32, 1, 24, 40, 5)
    assert (form, why) == ("plain", "there is no C++ kernel: switched off by a test")
