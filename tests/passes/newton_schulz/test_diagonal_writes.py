"""Steps that add a number to a diagonal in place, as HeavyBall's does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, always, matrix

aten = torch.ops.aten
Form = Callable[[Tensor], Tensor]


def normal(G: Tensor) -> Tensor:
    return G / G.norm(dim=(-2, -1), keepdim=True)


def by_diagonals(G: Tensor) -> Tensor:
    X = normal(G)
    for a, b, c in [(3.4445, -4.775, 2.0315), (2.8769, -3.1427, 1.2046)]:
        S = X @ X.mT
        Y = c * S
        Y.diagonal(dim1=-2, dim2=-1).add_(b)
        Y = Y @ S
        Y.diagonal(dim1=-1, dim2=-2).add_(a)
        X = Y @ X
    return X * 2


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)], ids=["a matrix", "a batch"])
def test_what_is_added_to_a_diagonal_is_a_multiple_of_the_identity(shape: tuple[int, ...]) -> None:
    G = matrix(*shape)
    rewritten = Rewritten(by_diagonals, G)
    (row,) = rewritten.rows
    assert (row.action, row.count, row.calls, row.steps) == ("rewritten", 1, 1, 2)
    assert row.coefficients == ((3.4445, -4.775, 2.0315), (2.8769, -3.1427, 1.2046))
    assert not {aten.diagonal.default, aten.eye.default, aten.mm.default} & set(rewritten.targets)
    torch.testing.assert_close(rewritten(G), by_diagonals(G), atol=1e-5, rtol=0)


def variant(
    on: Form = lambda Y: Y.diagonal(dim1=-2, dim2=-1),
    after: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda X, Y, D: X * 2,
) -> Form:
    """One step with another diagonal or another reader."""

    def run(G: Tensor) -> Tensor:
        X = normal(G)
        S = X @ X.mT
        Y = 2.0315 * S
        D = on(Y)
        D.add_(-4.775)
        X = 3.4445 * X + (Y @ S) @ X
        return after(X, Y, D)

    return run


def test_a_gram_matrix_with_a_shifted_diagonal_is_the_polynomial_that_it_is_of() -> None:
    """a X + (b S + c S^2) X with S = A + s I. Its last product is one already: a X stays a sum."""
    a, b, c, s = 3.4445, -4.775, 2.0315, 0.125

    def run(G: Tensor) -> Tensor:
        X = normal(G)
        S = X @ X.mT
        S.diagonal().add_(s)
        X = a * X + (b * S + c * S @ S) @ X
        return X * 2

    G = matrix(4, 6)
    rewritten = Rewritten(run, G)
    (row,) = rewritten.rows
    expected = (b * s + c * s * s, b + 2 * c * s, c)
    assert (row.action, row.coefficients[0]) == ("rewritten", pytest.approx(expected))
    torch.testing.assert_close(rewritten(G), run(G), atol=1e-5, rtol=0)


LOOKALIKES: list[tuple[str, Form]] = [
    ("above the diagonal", variant(lambda Y: Y.diagonal(1))),
    ("a row", variant(lambda Y: Y[0])),
    ("of half the matrix", variant(lambda Y: Y[:2, :2].diagonal())),
    ("a tensor", variant(lambda Y: Y.diagonal().add_(Y[0].sum()))),
    ("the view is read later", variant(after=lambda X, Y, D: X * 2 + D.sum())),
    ("the matrix is read later", variant(after=lambda X, Y, D: X * 2 + Y.sum())),
    ("written twice", variant(lambda Y: Y.diagonal().add_(1.0))),
    ("a view of the matrix", variant(lambda Y: Y.mT.diagonal())),
]


def test_the_plain_variant_is_rewritten() -> None:
    assert [row.action for row in Rewritten(variant(), matrix(4, 6)).rows] == ["rewritten"]


@pytest.mark.parametrize(("name", "run"), LOOKALIKES, ids=[x[0] for x in LOOKALIKES])
def test_what_is_no_sum_with_the_identity_stays_as_it_was_written(name: str, run: Form) -> None:
    G = matrix(4, 6)
    rewritten = Rewritten(run, G)
    assert (rewritten.count, rewritten.calls) == (0, [])
    assert sorted(map(str, rewritten.targets)) == sorted(map(str, rewritten.before))
    torch.testing.assert_close(rewritten(G), run(G), atol=0, rtol=0)


@pytest.mark.parametrize("reads_before", [False, True])
def test_what_the_cost_model_leaves_is_a_write_again(
    monkeypatch: pytest.MonkeyPatch, reads_before: bool
) -> None:
    always(monkeypatch, "plain")

    def run(G: Tensor) -> Tensor:
        other = G[:, :4].sin()
        before = other * 2 if reads_before else G.cos()
        other.diagonal().add_(1.5)
        return by_diagonals(G) + other.sum() + before.sum()

    G = matrix(4, 6)
    rewritten = Rewritten(run, G)
    assert [row.action for row in rewritten.rows] == ["left"]
    assert rewritten.targets == rewritten.before
    torch.testing.assert_close(rewritten(G), run(G), atol=0, rtol=0)


def test_a_write_that_no_iteration_holds_stays_a_write_where_others_are_rewritten() -> None:
    def run(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        other = G[:, :4].sin()
        early = other * 2
        other.diagonal().add_(1.5)
        return by_diagonals(G), other * 1, early

    G = matrix(4, 6)
    rewritten = Rewritten(run, G)
    assert (rewritten.count, rewritten.targets.count(aten.diagonal.default)) == (1, 1)
    for ours, theirs in zip(rewritten(G), run(G), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
