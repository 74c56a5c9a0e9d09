"""The form that is taken, by device, dtype and shape, and the reason that is given."""

import re
import warnings

import pytest
import torch

from moonfx import fallback
from moonfx.kernels.cpu import library as cpu_build
from moonfx.ops import newton_schulz_cost
from moonfx.ops.newton_schulz import newton_schulz_flops, newton_schulz_form
from tests.support.newton_schulz_cases import (
    COEFFICIENTS,
    matrix,
)
from tests.support.newton_schulz_cpu import CPU, OPERATOR, QUINTIC, needs_kernel

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
