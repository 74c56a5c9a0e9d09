"""One warning that something runs slower than it could, whichever part falls back first."""

import warnings
from collections.abc import Iterator

import pytest

from moonfx import fallback


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    fallback.forget()
    yield
    fallback.forget()


def test_it_says_what_is_slow_and_how_to_mend_it() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        fallback.warn_slow("the kernel runs in torch", "install g++")
    assert str(caught[0].message) == (
        "moonfx: the kernel runs in torch: install g++. `moonfx doctor` checks the set-up."
    )


def test_it_is_said_once_whatever_falls_back_next() -> None:
    with pytest.warns(RuntimeWarning):
        fallback.warn_slow("the graph runs in eager mode", "install g++")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallback.warn_slow("the kernel runs in torch", "install g++")
    fallback.forget()
    with pytest.warns(RuntimeWarning, match="the kernel"):
        fallback.warn_slow("the kernel runs in torch", "install g++")


def test_it_points_at_who_asked_for_what_is_slow() -> None:
    def asks() -> None:
        falls_back()

    def falls_back() -> None:
        fallback.warn_slow("it", "install g++")

    with pytest.warns(RuntimeWarning) as caught:
        asks()
    assert (caught[0].filename, caught[0].lineno) == (
        __file__,
        asks.__code__.co_firstlineno + 1,
    )
