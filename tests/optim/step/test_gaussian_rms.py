"""What a law says of the RMS, against what Newton-Schulz in bfloat16 makes of matrices."""

import math

import pytest
import torch

from moonfx.optim.coefficients import COEFFICIENTS, composed, per_step
from moonfx.optim.step.gaussian_rms import correction
from tests.support.optim.orthogonal import flat, matrix, orthogonal, rms

# Sides 64 to 1024, square to 1:16. A mean over few singular values fluctuates: four small matrices.
SHAPES = [(4, 64, 64), (4, 1024, 64), (1, 256, 256), (1, 256, 1024)]
ROWS = [(name, shape) for name in COEFFICIENTS for shape in SHAPES]
ROWS += [("muon", (1, 1024, 1024)), ("polar_express", (1, 1024, 1024))]


@pytest.mark.parametrize(("name", "shape"), ROWS)
def test_a_gaussian_matrix_gets_the_rms_that_its_correction_promises(name, shape):
    _, m, n = shape
    got = rms(orthogonal(matrix(*shape), name)) * math.sqrt(max(m, n))
    # The goal is 3 %. What is left is the fluctuation of one matrix's spectrum, below 1 %.
    assert got == pytest.approx(correction(m, n, per_step(name)), rel=0.01)


# RMS(O) sqrt(max), measured on Gaussian matrices elsewhere, to three digits.
MEASURED = [
    ("muon", 256, 256, 0.905),
    ("muon", 256, 1024, 0.955),
    ("quintic", 256, 256, 0.997),
    ("quintic", 256, 1024, 1.001),
    ("cubic", 256, 256, 1.019),
    ("cubic", 256, 1024, 1.061),
    ("deepseek_v4", 256, 256, 1.000),
    ("deepseek_v4", 256, 1024, 1.000),
]


@pytest.mark.parametrize(("name", "m", "n", "expected"), MEASURED)
def test_corrections_are_those_that_were_measured_before(name, m, n, expected):
    assert correction(m, n, per_step(name)) == pytest.approx(expected, abs=0.004)
    assert correction(n, m, flat(per_step(name))) == correction(m, n, per_step(name))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_vector_has_one_singular_value_and_so_an_exact_correction(name):
    """[1, N] gives |p(1)|, for Jordan's coefficients 0.69 of the nominal RMS."""
    exact = correction(1, 64, per_step(name))
    assert exact == abs(composed(per_step(name), 1.0))
    got = rms(orthogonal(matrix(64, 1), name, torch.float64)) * math.sqrt(64)
    assert got == pytest.approx(exact, rel=1e-5)
    if name == "muon":
        assert exact == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_lemma_1_the_rms_of_an_update_of_rank_r_is_the_root_of_r_over_its_entries(rank):
    x = matrix(64, rank).double() @ matrix(rank, 256, seed=1).double()
    # Ten steps that converge: all singular values 1. float64: in bfloat16 rounding has full rank.
    got = rms(orthogonal(x, "polar_express", torch.float64, steps=10))
    assert got == pytest.approx(math.sqrt(rank / (64 * 256)), rel=1e-6)


@pytest.mark.parametrize(("m", "n", "double"), [(64, 256, 2), (256, 64, 2), (64, 64, 1)])
def test_table_1_of_moonlight_the_weights_of_an_mlp_double(m, n, double):
    """[H, 4H] scaled by 0.2 sqrt(H), then by 0.2 sqrt(max): the sum of random steps doubles.

    The paper's own weights went from 2.52e-2 to 5.01e-2, and attention's, [H, H], stayed.
    """
    steps, gain = 20, correction(m, n, per_step("muon"))
    total = sum(orthogonal(matrix(m, n, seed=i)).float() for i in range(steps)) / gain
    # Independent steps add up as their squares do; 20 of them leave their sum a few percent off.
    expected = 0.2 * math.sqrt(steps)
    assert rms(0.2 * math.sqrt(max(m, n)) * total) == pytest.approx(expected, rel=0.05)
    assert rms(0.2 * math.sqrt(64) * total) == pytest.approx(expected / double, rel=0.05)
