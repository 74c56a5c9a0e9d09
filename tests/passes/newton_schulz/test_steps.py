"""A step is what is a quintic of X, and nothing that only looks like one."""

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized
from tests.support.newton_schulz.lookalikes import (
    ELSE,
    SQUARE,
    Body,
    Near,
    Row,
    check_lookalike,
    check_near,
)
from tests.support.newton_schulz.spellings import MATRIX, Spelling, plain

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


def product_into_x(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """X is A when it is read again."""
    A = torch.mm(X, X.t(), out=X)
    return a * X + (b * A + c * A @ A) @ X


def ones_that_are_added_to(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A, Y = X @ X.mT, torch.ones_like(X)
    Y += a * X
    Y += (b * A + c * A @ A) @ X
    return Y


def zeros_written_to_between(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A, Y = X @ X.mT, torch.zeros_like(X)
    Y += a * X
    Y[0, 0] = 1.0
    return Y.add_((b * A + c * A @ A) @ X)


def no_fifth_power(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """As cubic sets of coefficients are given to code for quintic ones."""
    return plain(X, X @ X.mT, a, b, 0.0)


def no_third_power(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, X @ X.mT, a, 0.0, c)


NEAR: list[Near] = [
    ("out=X", product_into_x, SQUARE, "a X + (b A + c A^2) X is not formed of A = X X^T"),
    ("ones", ones_that_are_added_to, MATRIX, ELSE),
    ("zeros and a 1", zeros_written_to_between, MATRIX, ELSE),
    ("c is 0", no_fifth_power, MATRIX, "a cubic step: the operator's has A^2"),
    ("b is 0", no_third_power, MATRIX, "a step without the term b A X"),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


def cubic(G: Tensor) -> Tensor:
    X = normalized(G)
    for _ in range(3):
        X = 1.5 * X - 0.5 * (X @ X.mT) @ X
    return X


def without_the_cube(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + c * A @ A @ X


def without_x(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return (b * A + c * A @ A) @ X


def a_of_the_last_x(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X = a * X + b * A @ X
    return a * X + (b * A + c * A @ A) @ X


def x_of_the_last_step(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    Y = a * X + (b * A + c * A @ A) @ X
    A = Y @ Y.mT
    return a * Y + (b * A + c * A @ A) @ X


def times_another(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ Y


def batch_is_broadcast(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ X.mT
    return a * Y + (b * A + c * A @ A) @ X


def written_between(G: Tensor, H: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X.add_(H)
    return a * X + (b * A + c * A @ A) @ X


def written_through_a_view(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X[0].zero_()
    return a * X + (b * A + c * A @ A) @ X


def a_is_written_through_a_view(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    A.diagonal(1).add_(1e-3)
    return a * X + (b * A + c * A @ A) @ X


G = matrix(4, 6)
LOOKALIKES: list[Row] = [
    ("a cubic", cubic, (G,), "a cubic step: the operator's has A^2"),
    ("no cube", without_the_cube, (G,), "a step without the term b A X"),
    ("no X", without_x, (G,), "is not formed of A = X X^T"),
    ("A of the last X", a_of_the_last_x, (G,), "is not formed of A = X X^T"),
    ("X of the last step", x_of_the_last_step, (G,), ELSE),
    ("times another", times_another, (G, matrix(4, 6, seed=1)), ELSE),
    ("a batch", batch_is_broadcast, (G, matrix(3, 4, 6)), ELSE),
    ("X written", written_between, (G, matrix(4, 6, seed=1)), ELSE),
    ("X written by a view", written_through_a_view, (G,), ELSE),
    ("A written by a view", a_is_written_through_a_view, (G,), ELSE),
]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    check_lookalike(body, inputs, reason)
