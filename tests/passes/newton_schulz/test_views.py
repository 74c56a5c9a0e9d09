"""Views and copies stand for a matrix or its transpose, and no other view does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.graph.nodes import operator_name
from moonfx.passes.newton_schulz.operands import Unclear
from moonfx.passes.newton_schulz.views import OF_FIRST, VIEWS
from tests.support.newton_schulz.cases import matrix
from tests.support.newton_schulz.forms import QUINTIC
from tests.support.newton_schulz.lookalikes import (
    BROADCAST,
    Near,
    check_near,
)
from tests.support.newton_schulz.spellings import BATCHES, MATRIX, Spelling, plain

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


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


def batch_of_two(X: Tensor, a: float, b: float, c: float) -> Tensor:
    Y = X.expand(2, 4, 6)
    return a * X + ((b * (Y @ Y.mT) + c * (Y @ Y.mT) @ (Y @ Y.mT)) @ Y).sum(0)


def batch_dims_the_other_way(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """As many matrices, each with the A of another."""
    A = (X @ X.mT).transpose(0, 1).reshape(2, 3, 4, 4)
    return plain(X, A, a, b, c)


def copied_from_a_row(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    B = torch.empty_like(A).copy_((b * A + c * A @ A)[0])
    return a * X + B @ X


NEAR: list[Near] = [
    ("a slice", slice_without_a_column, MATRIX, None),
    ("every second row", every_second_row, MATRIX, None),
    ("other rows", rows_reshaped, MATRIX, BROADCAST),
    ("a transpose by reshape", transpose_reshaped, MATRIX, None),
    ("a batch of two", batch_of_two, MATRIX, "a X + (b A + c A^2) X is not formed of A = X X^T"),
    (
        "batch dims swapped",
        batch_dims_the_other_way,
        BATCHES,
        "dims are permuted that are not the matrix's own",
    ),
    ("a row copied", copied_from_a_row, MATRIX, BROADCAST),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


# Name, a view or copy of X [2, 4, 6], and what it stands for; None where it is no matrix of X's.
OF_X: list[tuple[str, Callable[[Tensor], Tensor], str | None]] = [
    ("clone", lambda X: X.clone(), "X"),
    ("transpose", lambda X: X.transpose(-2, -1), "T"),
    ("permute", lambda X: X.permute(0, 2, 1), "T"),
    ("permute of nothing", lambda X: X.permute(0, 1, 2), "X"),
    ("adjoint", lambda X: X.adjoint(), "T"),
    ("the first", lambda X: X[:1], None),
    ("all of them", lambda X: X[:2], "X"),
    ("one batch dim more", lambda X: X.view(2, 1, 4, 6), "X"),
    ("rows joined", lambda X: X.reshape(1, 8, 6), None),
    ("rows and columns reshaped", lambda X: X.reshape(2, 6, 4), None),
    ("repeated", lambda X: X.expand(3, 2, 4, 6), None),
    ("the batch's dim moved", lambda X: X.permute(1, 0, 2), None),
]


@pytest.mark.parametrize(("view", "stands_for"), [v[1:] for v in OF_X], ids=[v[0] for v in OF_X])
def test_a_view_stands_for_x_its_transpose_or_nothing(
    view: Callable[[Tensor], Tensor], stands_for: str | None
) -> None:
    gm = make_fx(view, pre_dispatch=True, tracing_mode="fake")(matrix(2, 4, 6))
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    if stands_for is None:
        with pytest.raises(Unclear):
            VIEWS[node.target](node, lambda operand: {"X": 1.0})
    else:
        assert VIEWS[node.target](node, lambda operand: {"X": 1.0}) == {stands_for: 1.0}


def test_of_a_second_operand_that_says_a_size_no_entry_is_read() -> None:
    body = lambda X: X.view_as(X).type_as(X).expand_as(X)  # noqa: E731
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(matrix(4, 6))
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [n.target in OF_FIRST for n in calls if len(n.all_input_nodes) > 1].count(False) == 0
    assert all(n.target in VIEWS for n in calls), [operator_name(n) for n in calls]
