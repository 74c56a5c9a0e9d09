"""Programs that write, view and copy around an iteration: what is rewritten, and what is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import CHANGING, QUINTIC, normalized, step

a, b, c = QUINTIC
Body = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("operator_always")


def an_alias_is_written_after(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    view = X[:]
    Y = step(view)
    X.add_(1)
    return Y * 1, view * 1


def an_alias_is_written_before_the_last_read(G: Tensor) -> Tensor:
    X = normalized(G)
    view = X[:]
    A = view @ view.mT
    first = a * view
    X.add_(1)
    return first + (b * A + c * A @ A) @ view


def what_was_copied_is_written(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    copy = X.clone()
    A = copy @ X.mT
    X.add_(1)
    return a * copy + (b * A + c * A @ A) @ copy, X * 1


def what_was_copied_is_written_before_a(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    copy = X.clone()
    X.add_(1)
    A = copy @ X.mT
    return a * copy + (b * A + c * A @ A) @ copy, X * 1


def a_copy_is_written_in_place(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    copy = X.clone()
    A = copy @ copy.mT
    copy.mul_(a).add_((b * A + c * A @ A) @ X)
    return copy * 1, X * 1


def copies_of_x_are_read_by_others(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    T = X.mT
    copy = T.contiguous()
    A = X @ copy
    return a * X + (b * A + c * A @ A) @ X, T + 1, copy + 1


def rows_of_one_tensor_are_written_back(G: Tensor) -> Tensor:
    """For all that is known, the first wrote to the second's rows: it is not looked into."""
    X = normalized(G)
    for rows in X.split(2):
        rows.copy_(step(rows))
    return X * 1


def matrices_of_a_batch_are_written_back(G: Tensor) -> Tensor:
    X = normalized(G)
    for i in range(len(X)):
        X[i] = step(X[i])
    return X * 1


def a_batch_is_filled(G: Tensor) -> Tensor:
    X = normalized(G)
    out = torch.empty_like(X)
    for i in range(len(X)):
        out[i].copy_(step(X[i]))
    return out * 1


def a_row_of_a_buffer_goes_on(G: Tensor) -> tuple[Tensor, ...]:
    """The first X_1 is still in the buffer after the second step."""
    buffer = torch.zeros(2, *G.shape)
    row = buffer[0].copy_(step(normalized(G)))
    return step(row) * 1, buffer * 1


def other_batch_dims_by_a_view(G: Tensor) -> tuple[Tensor, ...]:
    """X_0 is [1, m, n] and X_2 [m, n]."""
    X = normalized(G)
    Y = step(step(X[None])[0])
    X.zero_()
    return Y, X * 1


def other_batch_dims_by_a_copy(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    Y = step(step(X[None].clone())[0])
    X.zero_()
    return Y, X * 1


def a_batch_dim_of_one_is_spread(G: Tensor) -> Tensor:
    """[3, 1, m, n] and [3, m, m] make [3, 3, m, n]."""
    X = normalized(G)
    x = X.squeeze(1)
    A = x @ x.mT
    return a * X + (b * A + c * A @ A) @ X


def batches_are_turned(G: Tensor) -> Tensor:
    X = normalized(G)
    A = (X @ X.mT).transpose(0, 1)
    return a * X + (b * A + c * A @ A) @ X


def two_share_a(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ X, 2 * X + (1.5 * A + 0.5 * A @ A) @ X


def both_sides_of_x(G: Tensor) -> Tensor:
    X = normalized(G)
    A, B = X @ X.mT, X.mT @ X
    return a * X + b * A @ X + c * A @ X @ B


def both_sides_the_wrong_way(G: Tensor) -> Tensor:
    X = normalized(G)
    A, B = X @ X.mT, X.mT @ X
    return a * X + b * A @ X + c * A @ B @ X


def one_row_in_double(G: Tensor) -> Tensor:
    """A is [1, 1]."""
    X = normalized(G)
    A = (X @ X.mT).double()
    return a * X + (b * A + c * A @ A).float() @ X


def one_entry_is_cast(G: Tensor) -> Tensor:
    return step(step(normalized(G)).double())


def one_entry_squared(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X
    return a * X + (b * A + c * A @ A) @ X


def a_is_overwritten_by_its_square(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    torch.mm(A, A, out=A)
    return a * X + (b * A + c * A) @ X


def a_copy_is_squared_into_a(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    copy = A.clone()
    torch.mm(copy, copy, out=A)
    return a * X + (b * copy + c * A) @ X


def iterate_in_a_buffer(G: Tensor, buffer: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        torch.mm(X, X.mT, out=buffer)
        X = a * X + (b * buffer + c * buffer @ buffer) @ X
    return X * 1


def one_buffer_for_all_steps(G: Tensor) -> Tensor:
    return iterate_in_a_buffer(G, torch.empty(4, 4))


def the_buffer_is_read_after(G: Tensor) -> tuple[Tensor, ...]:
    buffer = torch.empty(4, 4)
    return iterate_in_a_buffer(G, buffer), buffer * 1


def zeros_are_seen_by_a_view(G: Tensor) -> tuple[Tensor, ...]:
    X = normalized(G)
    Y = torch.zeros_like(X)
    row = Y[0]
    Y += a * X
    A = X @ X.mT
    Y += (b * A + c * A @ A) @ X
    return Y, row * 1


def an_identity_becomes_the_step(G: Tensor) -> Tensor:
    X, B = normalized(G), torch.eye(4)
    A = X @ X.mT
    return B.mul_(a).add_(A, alpha=b).addmm_(A, A, alpha=c) @ X


def an_identity_is_read_after(G: Tensor) -> tuple[Tensor, ...]:
    X, eye = normalized(G), torch.eye(4)
    A = X @ X.mT
    Y = (a * eye + b * A + c * A @ A) @ X
    eye.mul_(2)
    return Y, eye * 1


def an_alias_of_a_is_scaled(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    A[:].mul_(2)
    return a * X + (b * A + c * A @ A) @ X


def cubic_steps_at_the_end(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in (*CHANGING[:2], (1.5, -0.5, 0.0)):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


M, B3 = (4, 6), (3, 4, 6)
ONE, TWO, NONE = [(1, 1, "rewritten")], [(1, 2, "rewritten")], [(1, 0, "declined")]
# name, function, shape, the rows: how many iterations of how many steps, and what became of them
PROGRAMS: list[tuple[str, Body, tuple[int, ...], list[tuple[int, int, str]]]] = [
    ("an alias, written after", an_alias_is_written_after, M, ONE),
    ("an alias, written before", an_alias_is_written_before_the_last_read, M, NONE),
    ("a copy's original", what_was_copied_is_written, M, ONE),
    ("a copy's original, early", what_was_copied_is_written_before_a, M, []),
    ("a copy in place", a_copy_is_written_in_place, M, ONE),
    ("copies read", copies_of_x_are_read_by_others, M, ONE),
    ("rows", rows_of_one_tensor_are_written_back, M, ONE),
    ("matrices", matrices_of_a_batch_are_written_back, B3, [(3, 1, "rewritten")]),
    ("a batch filled", a_batch_is_filled, B3, [(3, 1, "rewritten")]),
    ("a row of a buffer", a_row_of_a_buffer_goes_on, M, [(1, 2, "declined")]),
    ("batch dims by a view", other_batch_dims_by_a_view, M, TWO),
    ("batch dims by a copy", other_batch_dims_by_a_copy, M, [(1, 2, "declined")]),
    ("a batch dim of 1", a_batch_dim_of_one_is_spread, (3, 1, 4, 6), NONE),
    ("batches turned", batches_are_turned, (3, 3, 4, 6), NONE),
    ("A shared", two_share_a, M, [(1, 1, "declined"), (1, 1, "declined")]),
    ("both sides", both_sides_of_x, (4, 4), ONE),
    ("both sides, wrong", both_sides_the_wrong_way, (4, 4), NONE),
    ("one row", one_row_in_double, (1, 6), NONE),
    ("one entry", one_entry_is_cast, (1, 1), [(1, 1, "rewritten")] * 2),
    ("one entry, squared", one_entry_squared, (1, 1), []),
    ("A^2 into A", a_is_overwritten_by_its_square, M, NONE),
    ("A's copy", a_copy_is_squared_into_a, M, ONE),
    ("one buffer", one_buffer_for_all_steps, M, [(1, 3, "rewritten")]),
    ("one buffer, read", the_buffer_is_read_after, M, [(1, 3, "declined")]),
    ("zeros, seen", zeros_are_seen_by_a_view, M, [(1, 1, "declined")]),
    ("an identity in place", an_identity_becomes_the_step, M, ONE),
    ("an identity read", an_identity_is_read_after, M, ONE),
    ("A's alias", an_alias_of_a_is_scaled, M, NONE),
    ("a cubic end", cubic_steps_at_the_end, M, [(1, 2, "declined")]),
]


@pytest.mark.parametrize(("name", "body", "shape", "rows"), PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_what_is_written_around_an_iteration_is_as_it_was(
    name: str, body: Body, shape: tuple[int, ...], rows: list[tuple[int, int, str]]
) -> None:
    G = matrix(*shape)
    rewritten = Rewritten(body, G)
    assert [(r.count, r.steps, r.action) for r in rewritten.rows] == rows
    given = [G.clone(), G.clone()]
    for ours, theirs in zip(_all(rewritten, given[0]), _all(body, given[1]), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)  # see test_newton_schulz


def _all(run: Body, G: Tensor) -> list[Tensor]:
    out = run(G)
    return [*(out if isinstance(out, tuple) else (out,)), G]
