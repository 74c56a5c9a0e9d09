"""Coefficient sets of Newton-Schulz: each set's scalar map against what was published of it."""

import math

import pytest
import torch
from torch import Tensor

from moonfx.optim.coefficients import COEFFICIENTS, POLAR_EXPRESS, SAFETY, composed, per_step

# set, steps, published or derived bounds of the composed map on [0.001, 1], and from which singular
# value on it stays above 0.67 (the fast sets give up accuracy for slope at zero, by design).
MAPS = [
    # Keller Jordan's post: "the resulting matrix has singular values in about [0.7, 1.2]".
    ("muon", 5, 0.0015, 0.67, 1.21),
    ("quintic", 5, 0.0016, 0.71, 1.15),
    # Theorem 4.1: [2 - u, u] with u = 1.12356 after five steps; the safety factor widens it below.
    ("polar_express", 5, 0.001, 0.846, 1.12356),
    ("polar_express", 6, 0.001, 0.994, 1.00119),
    ("polar_express", 8, 0.001, 0.9999999, 1.0000001),
    ("polar_express", 12, 0.001, 0.9999999, 1.0000001),
    ("deepseek_v4", 10, 0.001, 0.9999, 1.0006),
    ("cubic", 5, 0.006, 0.67, 1.3),
]


def image(triples, x: Tensor) -> Tensor:
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize(("name", "steps", "start", "low", "high"), MAPS)
def test_each_set_maps_singular_values_into_its_published_interval(name, steps, start, low, high):
    x = torch.logspace(-3, 0, 50_000, dtype=torch.float64)
    y = image(per_step(name, steps), x)
    assert low <= y[x >= start].min()
    assert y.max() <= high
    assert y[x >= start].min() - low < 0.01  # the row states the interval, not something wider
    assert composed(per_step(name, steps), 0.5) == pytest.approx(
        image(per_step(name, steps), torch.tensor(0.5, dtype=torch.float64)).item()
    )


def test_each_step_of_polar_express_is_the_optimal_one_of_its_interval():
    """Optimal (lemma A.1): |1 - p| reaches its maximum at four points, with alternating signs.

    The paper's implementation takes the lower end as no less than 0.0240733 of the upper one.
    """
    low, high = 0.001, 1.0
    for a, b, c in POLAR_EXPRESS[:6]:
        x = torch.linspace(max(low, 0.02407327424182761 * high), high, 400_001, dtype=torch.float64)
        error = 1 - image([(a, b, c)], x)
        turns = (error.diff().sign().diff() != 0).nonzero().flatten() + 1
        at = error[[0, *turns.tolist(), -1]]
        assert at.sign().tolist() in ([1, -1, 1, -1], [-1, 1, -1, 1])
        # p is scaled so that the whole interval, not only the part it is optimal on, is centred.
        inner, outer = at[::2].abs(), at[1::2].abs()
        assert inner.max() - inner.min() < 1e-6
        assert outer.max() - outer.min() < 1e-6
        y = image([(a, b, c)], torch.linspace(low, high, 400_001, dtype=torch.float64))
        low, high = y.min().item(), y.max().item()
        assert low + high == pytest.approx(2, abs=1e-6)


def test_polar_express_is_safe_for_rounded_norms_and_another_safety_is_another_set():
    x = torch.linspace(0, SAFETY, 100_001, dtype=torch.float64)
    assert image(per_step("polar_express", 5), x).max() < 1.124
    assert image(POLAR_EXPRESS[:5], x).max() > 1e6  # without the factor, 1 + 2^-8 explodes
    # The slope at zero, which decides how small singular values are lifted, differs by a fifth.
    slopes = [math.prod(a / factor for a, _, _ in POLAR_EXPRESS[:5]) for factor in (SAFETY, 1.05)]
    assert composed(per_step("polar_express", 5), 1e-9) / 1e-9 == pytest.approx(slopes[0])
    assert slopes[0] / slopes[1] == pytest.approx(1.214, abs=1e-3)


def test_the_number_of_steps_is_the_published_one_unless_the_set_goes_on_for_ever():
    assert [len(per_step(name)) for name in COEFFICIENTS] == [5, 5, 5, 10, 5]
    assert per_step("muon", 7) == [[3.4445, -4.7750, 2.0315]] * 7
    assert per_step("polar_express", 9)[7:] == [[1.875, -1.25, 0.375]] * 2
    assert per_step((2, -1.5, 0.5), 3) == [[2.0, -1.5, 0.5]] * 3
    assert per_step([(1.5, -0.5, 0), (2, -1.5, 0.5)]) == [[1.5, -0.5, 0.0], [2.0, -1.5, 0.5]]
    assert per_step(per_step("quintic"), 5) == per_step("quintic")


WRONG = [
    ("turbo", 5, ValueError, "one of muon, quintic, polar_express, deepseek_v4, cubic"),
    ("deepseek_v4", 5, ValueError, "exactly 10 steps: give steps=10, not 5"),
    ("muon", 0, ValueError, "steps must be at least 1, not 0"),
    ("muon", 2.0, TypeError, "steps must be an integer, not 2.0"),
    ("muon", True, TypeError, "steps must be an integer, not True"),
    (3, 5, TypeError, "a name or a sequence of triples"),
    ([], None, TypeError, "a name or a sequence of triples"),
    ([(1, 2)], None, ValueError, "three finite numbers, not (1, 2)"),
    ((1.0, float("nan"), 0.0), None, ValueError, "three finite numbers"),
    ([(1.5, -0.5, 0)] * 3, 5, ValueError, "steps must be 3, not 5"),
    ((3.4445, 4.775, 2.0315), 5, ValueError, "coefficients diverge"),
    (POLAR_EXPRESS[:2] + POLAR_EXPRESS[:2], 4, ValueError, "coefficients diverge"),
]


@pytest.mark.parametrize(("coefficients", "steps", "error", "message"), WRONG)
def test_wrong_coefficients_are_named(coefficients, steps, error, message):
    with pytest.raises(error) as raised:
        per_step(coefficients, steps)
    assert message in str(raised.value)
