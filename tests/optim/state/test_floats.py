"""The numbers of a tensor, kept as floats or as codes."""

import pytest
import torch

from moonfx.optim.state import low_bit
from moonfx.optim.state.floats import dequantized, gathered, has_codes, is_finite, number


def test_floats_are_given_as_they_are() -> None:
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    assert not has_codes(x)
    assert dequantized(x) is x
    assert gathered(x) is x
    assert number(torch.tensor(2.5)) == 2.5


def test_codes_are_read_as_floats() -> None:
    pytest.importorskip("torchao")
    x = torch.randn(64, 64)
    coded = low_bit.zeros(x, "int8")
    low_bit.write(coded, x)
    assert has_codes(coded)
    for read in (dequantized, gathered):
        floats = read(coded)
        assert (type(floats), floats.dtype) == (torch.Tensor, torch.float32)
        assert (floats - x).abs().max() < 0.05 * x.abs().max()  # 8 bits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_seen(bad: float) -> None:
    x = torch.zeros(5, 7)
    assert is_finite(x)
    x[3, 2] = bad
    assert not is_finite(x)


def test_numbers_whose_squares_overflow_are_finite_and_so_is_nothing_at_all() -> None:
    assert is_finite(torch.full((4,), 3e38))
    assert is_finite(torch.empty(0, 3))
