"""The two definitions of Newton-Schulz agree, and do to singular values what they say."""

import pytest
import torch

from moonfx.kernels.reference.newton_schulz import (
    JORDAN,
    by_products,
    by_singular_values,
    scalar_map,
)

STEPS = [JORDAN, (3.0, -3.2, 1.2), (1.5, -0.5, 0.0)]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 6), (3, 4, 6), (2, 6, 4)])
def test_products_give_what_the_singular_values_are_mapped_to(shape) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    matrix /= torch.linalg.matrix_norm(matrix, keepdim=True)
    found, expected = by_products(matrix, STEPS), by_singular_values(matrix, STEPS)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_a_step_maps_each_singular_value_by_itself() -> None:
    values = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    (a, b, c) = JORDAN
    once = torch.stack([a * s + b * s**3 + c * s**5 for s in values])
    torch.testing.assert_close(scalar_map(values, [JORDAN]), once)
    matrix = torch.diag(values)
    torch.testing.assert_close(by_products(matrix, [JORDAN]), torch.diag(once))


def test_no_steps_leave_a_matrix_as_it_is() -> None:
    matrix = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(by_products(matrix, []), matrix)
