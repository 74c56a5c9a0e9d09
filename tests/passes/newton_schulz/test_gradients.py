"""Gradients that reach an iteration through what is written to its operand's memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, always, matrix

Program = Callable[[Tensor], Tensor]


def steps(X: Tensor) -> Tensor:
    """Two steps: the first, whose operand goes by two names, may not be found."""
    for _ in range(2):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X


def an_entry_is_set(p: Tensor) -> Tensor:
    X = torch.zeros(2, 4, 6)
    X[0] = p
    return steps(X) * 2


def a_view_is_written(p: Tensor) -> Tensor:
    X = torch.zeros(4, 6)
    view = X.view(4, 6)
    X.add_(p)
    return steps(view) * 2


def a_list_is_written(p: Tensor) -> Tensor:
    X = torch.zeros(4, 6)
    torch._foreach_add_([X], [p])
    return steps(X) * 2


def a_view_is_written_without_gradients(p: Tensor) -> Tensor:
    X = torch.zeros(4, 6)
    view = X.view(4, 6)
    with torch.no_grad():
        X.add_(p)
    return steps(view) * p.sum()


def a_constant_is_written(p: Tensor) -> Tensor:
    X = torch.full((4, 6), 0.1)
    view = X.view(4, 6)
    X.add_(0.1)
    return steps(view) * p.sum()


def it_is_written_after(p: Tensor) -> Tensor:
    X = torch.full((4, 6), 0.1)
    Y = steps(X.view(4, 6)) * p.sum()
    X.add_(p)
    return Y + X


def it_is_detached(p: Tensor) -> Tensor:
    return steps(p.detach()) * p.sum()


def it_is_written_after_it_is_detached(p: Tensor) -> Tensor:
    X = torch.zeros(4, 6).detach()
    X.add_(p)
    return steps(X) * 2


PROGRAMS: list[tuple[Program, int]] = [
    (an_entry_is_set, 0),
    (a_view_is_written, 0),
    (a_list_is_written, 0),
    (a_view_is_written_without_gradients, 1),
    (a_constant_is_written, 1),
    (it_is_written_after, 1),
    (it_is_detached, 1),
    (it_is_written_after_it_is_detached, 0),
]


@pytest.mark.parametrize(("program", "count"), PROGRAMS, ids=[p.__name__ for p, _ in PROGRAMS])
def test_gradients_are_as_they_were(
    monkeypatch: pytest.MonkeyPatch, program: Program, count: int
) -> None:
    always(monkeypatch)
    rewritten = Rewritten(program, matrix(4, 6) * 0.2, gradients=True)
    assert rewritten.count == count
    gradients = []
    for run in (program, rewritten):
        p = matrix(4, 6).mul_(0.2).requires_grad_()
        run(p).sum().backward()
        gradients.append(p.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
