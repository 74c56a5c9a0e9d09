"""Multiples of the identity matrix are read, and nothing that is nearly one."""

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized
from tests.support.newton_schulz.lookalikes import (
    ELSE,
    Body,
    Near,
    Row,
    check_lookalike,
    check_near,
)
from tests.support.newton_schulz.spellings import BATCH, MATRIX, Spelling

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


def identity_of_one_matrix(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    eye = torch.zeros_like(A)
    eye[0] = torch.eye(4)
    return (a * eye + b * A + c * A @ A) @ X


def identity_tiled(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """[[I, I], [I, I]]."""
    A = X @ X.mT
    return (a * torch.eye(2).repeat(2, 2) + b * A + c * A @ A) @ X


def identity_off_the_diagonal(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (a * torch.diag(torch.ones(3), 1) + b * A + c * A @ A) @ X


def identity_of_fewer_rows(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (a * torch.eye(4, 1) + b * A + c * A @ A) @ X


def diagonal_of_other_numbers(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (torch.diag(torch.arange(4.0)) + b * A + c * A @ A) @ X


def diagonal_of_a_matrix(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (a * torch.diag(torch.ones(4, 4)) + b * A + c * A @ A) @ X


def diagonal_filled_in_ones(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (torch.ones_like(A).fill_diagonal_(a) + b * A + c * A @ A) @ X


def diagonal_filled_in_a_batch(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """[4, 4, 4]: entries i, i, i alone."""
    A = X @ X.mT
    return (torch.zeros_like(A).fill_diagonal_(a) + b * A + c * A @ A) @ X


def diagonal_written(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """Beside the diagonal; test_diagonal_writes.py writes to the diagonal itself."""
    A = X @ X.mT
    B = b * A + c * A @ A
    B.diagonal(1).add_(a)
    return B @ X


def identity_written_to(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A, eye = X @ X.mT, torch.eye(len(X))
    eye[0].zero_()
    return (a * eye + b * A + c * A @ A) @ X


def identity_of_whole_numbers(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """3.4445 becomes 3."""
    A = X @ X.mT
    eye = torch.eye(len(X), dtype=torch.int64).mul_(3).to(X)
    return (eye + b * A + c * A @ A) @ X


NEAR: list[Near] = [
    ("one identity of a batch", identity_of_one_matrix, BATCH, ELSE),
    ("identities tiled", identity_tiled, MATRIX, ELSE),
    ("off the diagonal", identity_off_the_diagonal, MATRIX, ELSE),
    ("a column", identity_of_fewer_rows, MATRIX, "a row or column is broadcast over a matrix"),
    ("0, 1, 2, 3", diagonal_of_other_numbers, MATRIX, ELSE),
    (
        "a matrix's diagonal",
        diagonal_of_a_matrix,
        MATRIX,
        "a row or column is broadcast over a matrix",
    ),
    ("ones off the diagonal", diagonal_filled_in_ones, MATRIX, ELSE),
    ("a cube's diagonal", diagonal_filled_in_a_batch, (4, 4, 6), ELSE),
    ("the diagonal written", diagonal_written, MATRIX, ELSE),
    ("an identity written to", identity_written_to, MATRIX, ELSE),
    ("whole numbers", identity_of_whole_numbers, MATRIX, ELSE),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


def entries_of_identities(G: Tensor) -> Tensor:
    """[4, 2, 2] of ones and zeros, and no matrix of them the identity."""
    X = normalized(G)
    A = X @ X.mT
    return (a * torch.eye(4).reshape(4, 2, 2) + b * A + c * A @ A) @ X


def a_one_is_repeated(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return (a * torch.eye(1).expand(4, 4) + b * A + c * A @ A) @ X


G = matrix(4, 6)
LOOKALIKES: list[Row] = [
    ("entries of identities", entries_of_identities, (matrix(4, 2, 3),), ELSE),
    ("a 1 is repeated", a_one_is_repeated, (G,), ELSE),
]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    check_lookalike(body, inputs, reason)
