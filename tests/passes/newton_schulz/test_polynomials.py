"""Polynomials in X and its transpose: their arithmetic, and which of them is a step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moonfx.passes.newton_schulz.polynomials import (
    DEGREE,
    Terms,
    plus,
    product,
    quintic,
    scaled,
    sides,
    transposed,
)

X = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = st.text("XT", max_size=DEGREE // 2)
NUMBERS = st.integers(-3, 3).map(float)
POLYNOMIALS = st.dictionaries(WORDS, NUMBERS, max_size=3)


def value(terms: Terms) -> Tensor:
    """What a polynomial is for a square X."""
    total = torch.zeros_like(X)
    for word, number in terms.items():
        each = torch.eye(3, dtype=X.dtype)
        for letter in word:
            each = each @ (X if letter == "X" else X.T)
        total = total + number * each
    return total


@settings(max_examples=50)
@given(POLYNOMIALS, POLYNOMIALS, NUMBERS)
def test_arithmetic_of_polynomials_is_that_of_their_values(p: Terms, q: Terms, c: float) -> None:
    both = product(p, q)
    assert both is not None
    torch.testing.assert_close(value(both), value(p) @ value(q))
    torch.testing.assert_close(value(plus(p, q)), value(p) + value(q))
    torch.testing.assert_close(value(scaled(p, c)), c * value(p))
    torch.testing.assert_close(value(transposed(p)), value(p).T)


def test_a_product_of_a_higher_degree_than_a_step_is_none() -> None:
    assert product({"XTX": 1.0}, {"TX": 2.0}) == {"XTXTX": 2.0}
    assert product({"XTX": 1.0}, {"": 1.0, "TXT": 2.0}) is None


STEPS: list[tuple[Terms, tuple[float, float, float] | None]] = [
    ({"X": 2.0, "XTX": -1.5, "XTXTX": 0.5}, (2.0, -1.5, 0.5)),
    ({"XTXTX": 0.5, "X": 2.0, "XTX": -1.5, "T": 0.0}, (2.0, -1.5, 0.5)),
    ({"X": 2.0, "XTX": -1.5, "XTXTX": 0.0}, None),  # a cubic
    ({"X": 2.0, "XTXTX": 0.5}, None),
    ({"T": 2.0, "TXT": -1.5, "TXTXT": 0.5}, None),  # of the transpose
    ({"X": 2.0, "XXX": -1.5, "XXXXX": 0.5}, None),
    ({"X": 2.0, "XTX": -1.5, "XTXTX": 0.5, "": 1.0}, None),
]


@pytest.mark.parametrize(("terms", "numbers"), STEPS, ids=lambda x: str(x))
def test_a_step_has_exactly_its_three_words(
    terms: Terms, numbers: tuple[float, float, float] | None
) -> None:
    assert quintic(terms) == numbers


def test_a_word_has_the_rows_of_its_first_letter_and_the_columns_of_its_last() -> None:
    assert sides({"X": 1.0}) == {("m", "n")}
    assert sides({"XT": 1.0, "XTXT": 1.0}) == {("m", "m")}
    assert sides({"TX": 1.0, "": 1.0}) == {("n", "n"), ("", "")}
    assert len(sides({"X": 1.0, "T": 1.0})) == 2  # equal for a square X alone
