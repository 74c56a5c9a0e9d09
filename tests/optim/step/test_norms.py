"""Matrices brought to norm 1, whatever the size of their numbers."""

import math

import pytest
import torch

from moonfx.optim.step.norms import normalized, root_mean_square


def stack(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_each_matrix_has_norm_one_in_float32_or_wider(dtype: torch.dtype) -> None:
    x = stack(dtype)
    found = normalized(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-110, -67, 63, 120])
def test_numbers_whose_squares_overflow_or_vanish_change_nothing(exponent: int) -> None:
    x = stack()
    torch.testing.assert_close(normalized(x * 2.0**exponent), normalized(x), atol=1e-6, rtol=1e-5)


def test_zeros_stay_zeros() -> None:
    assert not normalized(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_all_of_its_matrix_and_no_other(bad: float) -> None:
    x = stack()
    x[1, 2, 3] = bad
    found = normalized(x)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], normalized(stack())[[0, 2]], atol=0, rtol=0)


def test_the_stack_itself_is_not_changed() -> None:
    x = stack()
    normalized(x)
    assert torch.equal(x, stack())


def test_the_root_mean_square_is_of_all_numbers() -> None:
    assert root_mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(2.5)
    assert root_mean_square(torch.full((1000,), 0.5, dtype=torch.bfloat16)) == pytest.approx(0.5)
    assert root_mean_square(torch.empty(0)) == 0.0
    assert math.isnan(root_mean_square(torch.tensor([torch.nan])))
