"""How long the runs of steps are, and what a longer one would do."""

import pytest
import torch

from moonfx.kernels.reference import newton_schulz as reference
from moonfx.kernels.torch_ops import newton_schulz
from moonfx.ops import newton_schulz_runs as runs_
from tests.support.newton_schulz_cases import (
    COEFFICIENTS,
    GRAM,
    error,
    matrix,
)
from tests.support.newton_schulz_cpu import DTYPES, cpu_kernel, multiplies


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
    assert runs != runs_.choose_runs(COEFFICIENTS[name], torch.bfloat16, 48, 128)
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
        assert runs_.choose_runs(COEFFICIENTS[name], dtype, 100, 300) == expected


def test_more_steps_than_anyone_takes_are_single_ones_and_chosen_at_once() -> None:
    steps = COEFFICIENTS["muon"][:1] * 200
    assert runs_.choose_runs(steps, torch.float32, 64, 256) == (1,) * 200
