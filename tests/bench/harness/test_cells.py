"""Numbers as cells of a table."""

import pytest

from moonfx.bench.harness.cells import milliseconds, number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.0012345, "1.234"),
        (0.00999, "9.990"),
        (0.01, "10.0"),
        (2, "2000.0"),
    ],
)
def test_small_times_have_more_digits(seconds, text) -> None:
    assert milliseconds(seconds) == text


def test_what_was_not_measured_is_a_dash_and_no_zero() -> None:
    assert number(None) == "-"
    assert number(0.0) == "0.00"
    assert number(0.456, ".0%") == "46%"
