"""For each spelling of a step, one that differs in a letter and computes something else."""

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import normalized
from tests.support.newton_schulz.spellings import BATCH, BATCHES, MATRIX, Spelling, plain

SQUARE = (5, 5)


@pytest.fixture(autouse=True)
def operator_always(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)


def slice_without_a_column(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, X[:, 1:] @ X[:, 1:].mT, a, b, c)


def every_second_row(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """X^T X of half of X's rows."""
    A = X[::2].mT @ X[::2]
    return a * X + X @ (b * A + c * A @ A)


def rows_reshaped(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """Other rows of the same entries."""
    Y = X.reshape(3, 8)
    return a * X + ((b * (Y @ Y.mT) + c * (Y @ Y.mT) @ (Y @ Y.mT)) @ Y).reshape(4, 6)


def transpose_reshaped(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """[n, m] entries in X's order, and not X^T."""
    return plain(X, X @ X.reshape(6, 4), a, b, c)


def inner_of_a_transpose(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """X X."""
    return plain(X, torch.inner(X, X.mT), a, b, c)


def inner_of_a_batch(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.inner(X, X)[0, :, 0]
    return a * X + (b * A + c * A @ A) @ X


def tensordot_of_the_wrong_dims(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, torch.tensordot(X, X, dims=([0], [1])), a, b, c)


def tensordot_of_both_dims(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """The square of X's norm for A X."""
    A = X @ X.mT
    return a * X + b * torch.tensordot(X, X, dims=2) * X + c * A @ A @ X


def product_into_x(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """X is A when it is read again."""
    A = torch.mm(X, X.t(), out=X)
    return a * X + (b * A + c * A @ A) @ X


def sum_that_begins_with_one(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return sum([b * A @ X, c * A @ A @ X], start=1 + a * X)


def addmm_of_something(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, torch.addmm(X.new_ones(4, 4), X, X.t()), a, b, c)


def addmm_of_memory_not_written(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, torch.addmm(torch.empty(4, 4), X, X.t()), a, b, c)


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


def einsum_of_entries(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.einsum("ij,kj->ik", X, X)
    return a * X + (b * A + c * torch.einsum("ij,ij->ij", A, A)) @ X


def einsum_of_a_diagonal(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.einsum("ij,kj->ik", X, X)
    return a * X + b * A @ X + c * torch.einsum("ij,jj,jl->il", A, A, X)


def einsum_of_three_with_a_sum(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """k is summed over in A alone."""
    A = torch.einsum("ij,kj->ik", X, X)
    return a * X + b * A @ X + c * torch.einsum("ij,jk,jl->il", A, A, X)


def einsum_over_the_batch(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """One A, of all matrices."""
    return plain(X, torch.einsum("bij,bkj->ik", X, X), a, b, c)


def einsum_without_an_arrow_turned(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """The letters of a result are in the alphabet's order: "kj,ji" is [i, k]."""
    A = X @ X.mT
    return a * X + torch.einsum("kj,ji", b * A + c * A @ A, X)


def batch_of_two(X: Tensor, a: float, b: float, c: float) -> Tensor:
    Y = X.expand(2, 4, 6)
    return a * X + ((b * (Y @ Y.mT) + c * (Y @ Y.mT) @ (Y @ Y.mT)) @ Y).sum(0)


def batch_dims_the_other_way(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """As many matrices, each with the A of another."""
    A = (X @ X.mT).transpose(0, 1).reshape(2, 3, 4, 4)
    return plain(X, A, a, b, c)


def batch_dims_crossed(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """Each matrix is multiplied by every A."""
    A = X @ X.mT
    return a * X + ((b * A + c * A @ A).unsqueeze(1) @ X.unsqueeze(0)).sum(0)


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


def written_back_in_part(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    X[1:] = plain(X, A, a, b, c)[1:]
    return plain(X, A, a, b, c)


def copied_from_a_row(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    B = torch.empty_like(A).copy_((b * A + c * A @ A)[0])
    return a * X + B @ X


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


def no_fifth_power(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """As cubic sets of coefficients are given to code for quintic ones."""
    return plain(X, X @ X.mT, a, b, 0.0)


def no_third_power(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, X @ X.mT, a, 0.0, c)


def rounded_down(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return a * X + (b * A + torch.div(A @ A, 1 / c, rounding_mode="floor")) @ X


CUBE = (3, 4, 4)
ELSE = "something else than X comes in"
BROADCAST = "a matrix is broadcast or reshaped inside the step"
TENSOR = "a coefficient is a tensor, and not a number of the graph"
# name, one step, shape of X, the reason; None where nothing in it is like a step
NEAR: list[tuple[str, Spelling, tuple[int, ...], str | None]] = [
    ("a slice", slice_without_a_column, MATRIX, None),
    ("every second row", every_second_row, MATRIX, None),
    ("other rows", rows_reshaped, MATRIX, BROADCAST),
    ("a transpose by reshape", transpose_reshaped, MATRIX, None),
    ("inner, X X", inner_of_a_transpose, SQUARE, None),
    ("inner, batched", inner_of_a_batch, BATCH, None),
    ("tensordot, X^T X^T", tensordot_of_the_wrong_dims, SQUARE, None),
    ("tensordot, a number", tensordot_of_both_dims, MATRIX, TENSOR),
    ("out=X", product_into_x, SQUARE, "a X + (b A + c A^2) X is not formed of A = X X^T"),
    ("sum() from 1", sum_that_begins_with_one, MATRIX, ELSE),
    ("addmm, ones", addmm_of_something, MATRIX, ELSE),
    ("addmm, empty", addmm_of_memory_not_written, MATRIX, ELSE),
    ("ones", ones_that_are_added_to, MATRIX, ELSE),
    ("zeros and a 1", zeros_written_to_between, MATRIX, ELSE),
    ("einsum, A * A", einsum_of_entries, MATRIX, None),
    ("einsum, a diagonal", einsum_of_a_diagonal, MATRIX, "a cubic step: the operator's has A^2"),
    ("einsum, a sum", einsum_of_three_with_a_sum, MATRIX, "a cubic step: the operator's has A^2"),
    ("einsum, the batch", einsum_over_the_batch, BATCH, None),
    (
        "einsum, turned",
        einsum_without_an_arrow_turned,
        SQUARE,
        "a X + (b A + c A^2) X is not formed of A = X X^T",
    ),
    ("a batch of two", batch_of_two, MATRIX, "a X + (b A + c A^2) X is not formed of A = X X^T"),
    (
        "batch dims swapped",
        batch_dims_the_other_way,
        BATCHES,
        "dims are permuted that are not the matrix's own",
    ),
    ("batch dims crossed", batch_dims_crossed, BATCH, BROADCAST),
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
    (
        "written back in part",
        written_back_in_part,
        MATRIX,
        "A = X X^T of step 1 is also read by mul",
    ),
    ("a row copied", copied_from_a_row, MATRIX, BROADCAST),
    ("X / |X| in between", normalized_in_between, MATRIX, TENSOR),
    ("X / |X| after A", normalized_after_a, MATRIX, TENSOR),
    ("a table", coefficients_in_a_table, MATRIX, TENSOR),
    ("a table, unbound", coefficients_unbound, MATRIX, TENSOR),
    ("a matrix of one number", a_matrix_of_one_coefficient, MATRIX, TENSOR),
    ("c is 0", no_fifth_power, MATRIX, "a cubic step: the operator's has A^2"),
    ("b is 0", no_third_power, MATRIX, "a step without the term b A X"),
    ("rounded down", rounded_down, MATRIX, "div inside the step"),
]


@pytest.mark.parametrize(("name", "step", "shape", "reason"), NEAR, ids=[n[0] for n in NEAR])
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    name: str, step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    G = matrix(*shape)
    rewritten = Rewritten(lambda G: step(normalized(G), 3.4445, -4.7750, 2.0315), G)
    assert rewritten.calls == []
    assert rewritten.targets == rewritten.before
    assert [row.action for row in rewritten.rows] == ([] if reason is None else ["declined"])
    assert rewritten.reasons == ([] if reason is None else [reason])
