"""One node of a step, of polynomials in X; what is none is declined by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized, step
from tests.support.newton_schulz.lookalikes import (
    ELSE,
    SQUARE,
    TENSOR,
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


def sum_that_begins_with_one(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return sum([b * A @ X, c * A @ A @ X], start=1 + a * X)


def normalized_in_between(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ (X / X.norm())


def normalized_after_a(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return plain(X / X.norm(), A, a, b, c)


def coefficients_in_a_table(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """The table may be written to before the step is run."""
    table = torch.tensor([a, b, c])
    A = X @ X.mT
    return table[0] * X + (table[1] * A + table[2] * A @ A) @ X


def coefficients_unbound(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, X @ X.mT, *torch.tensor([a, b, c]).unbind())


def a_matrix_of_one_coefficient(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return X.new_full((1, 1), a) * X + (b * A + c * A @ A) @ X


def rounded_down(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return a * X + (b * A + torch.div(A @ A, 1 / c, rounding_mode="floor")) @ X


NEAR: list[Near] = [
    ("sum() from 1", sum_that_begins_with_one, MATRIX, ELSE),
    ("X / |X| in between", normalized_in_between, MATRIX, TENSOR),
    ("X / |X| after A", normalized_after_a, MATRIX, TENSOR),
    ("a table", coefficients_in_a_table, MATRIX, TENSOR),
    ("a table, unbound", coefficients_unbound, MATRIX, TENSOR),
    ("a matrix of one number", a_matrix_of_one_coefficient, MATRIX, TENSOR),
    ("rounded down", rounded_down, MATRIX, "div inside the step"),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


def coefficient_in_a_tensor(G: Tensor, k: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (k * A + c * A @ A) @ X


def one_coefficient_per_row(G: Tensor, k: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * (A * k) @ A) @ X


def entry_by_entry(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * A * A) @ X


def a_cubed(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * torch.linalg.matrix_power(A, 3)) @ X


def cast_in_the_middle(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + (c * A.bfloat16() @ A.bfloat16()).float()) @ X


def dropout(G: Tensor) -> Tensor:
    X = normalized(G)
    A = F.dropout(X @ X.mT, 0.1)
    return a * X + (b * A + c * A @ A) @ X


def noise(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    A = A + 1e-3 * torch.randn_like(A)
    return a * X + (b * A + c * A @ A) @ X


def ridge(G: Tensor) -> Tensor:
    """1e-3 on every entry, and not on the diagonal."""
    X = normalized(G)
    A = X @ X.mT + 1e-3
    return a * X + (b * A + c * A @ A) @ X


def clamped(G: Tensor) -> Tensor:
    X = normalized(G)
    A = (X @ X.mT).clamp(-1, 1)
    return a * X + (b * A + c * A @ A) @ X


def a_row_is_broadcast(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X[:1] + (b * A + c * A @ A) @ X


G = matrix(4, 6)
K = torch.tensor(-4.7)
LOOKALIKES: list[Row] = [
    ("a tensor's coefficient", coefficient_in_a_tensor, (G, K), "a coefficient is a tensor"),
    ("a coefficient per row", one_coefficient_per_row, (G, matrix(4, 1)), "entry by entry"),
    ("A * A", entry_by_entry, (matrix(*SQUARE),), None),
    ("A^3", a_cubed, (G,), None),
    ("a cast in the middle", cast_in_the_middle, (G,), "the dtype changes inside the step"),
    ("dropout", dropout, (G,), "dropout inside the step"),
    ("noise", noise, (G,), ELSE),
    ("a number added", ridge, (G,), "a number is added to every entry"),
    ("clamped", clamped, (G,), "clamp inside the step"),
    ("a row of X", a_row_is_broadcast, (G,), "a row or column is broadcast"),
]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    check_lookalike(body, inputs, reason)


def test_a_symbol_that_is_no_tensor_is_a_coefficient_that_is_not_known() -> None:
    def by_its_rows(G: Tensor) -> tuple[Tensor, Tensor]:
        X = normalized(G)
        unrelated = (X @ X.mT) * (1.0 / G.shape[0])
        return step(X), unrelated

    rewritten = Rewritten(by_its_rows, G, symbolic=True)
    assert rewritten.reasons == ["sizes are not known when the graph is compiled"]


def test_a_size_that_is_a_coefficient_is_not_known() -> None:
    def of_its_rows(G: Tensor) -> Tensor:
        X = normalized(G)
        A = X @ X.mT
        return a * X + (b * A + (1.0 / G.shape[0]) * (A @ A)) @ X

    inside = Rewritten(of_its_rows, G, symbolic=True)
    assert inside.reasons == ["a coefficient is not known when the graph is compiled"]
