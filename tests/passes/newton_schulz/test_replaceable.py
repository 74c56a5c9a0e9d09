"""An iteration is replaced where nobody else sees what lies within it."""

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized, step
from tests.support.newton_schulz.lookalikes import Body, Near, Row, check_lookalike, check_near
from tests.support.newton_schulz.spellings import MATRIX, Spelling, plain

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


def written_back_in_part(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    X[1:] = plain(X, A, a, b, c)[1:]
    return plain(X, A, a, b, c)


NEAR: list[Near] = [
    (
        "written back in part",
        written_back_in_part,
        MATRIX,
        "A = X X^T of step 1 is also read by mul",
    ),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


def septic(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    B = A @ A
    return a * X + b * A @ X + c * B @ X - 0.5 * (B @ A) @ X


def a_is_returned(G: Tensor) -> tuple[Tensor, Tensor]:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ X, A


def a_squared_is_watched(G: Tensor) -> tuple[Tensor, Tensor]:
    X = normalized(G)
    A = X @ X.mT
    B = A @ A
    seen = B.trace()
    return a * X + (b * A + c * B) @ X, seen


def x_is_watched(G: Tensor) -> tuple[Tensor, Tensor]:
    X = step(normalized(G))
    return step(X), X.norm()


def into_the_parameter(G: Tensor) -> Tensor:
    A = G @ G.mT
    B = b * A + c * A @ A
    return G.mul_(a).add_(B @ G)


def into_what_a_view_sees(G: Tensor) -> tuple[Tensor, Tensor]:
    X = normalized(G)
    row = X[0]
    A = X @ X.mT
    Y = (b * A + c * A @ A) @ X
    X.mul_(a).add_(Y)
    return X * 2, row + 1


def read_by_strides(G: Tensor) -> Tensor:
    """An offset counts from where the memory starts, which is where X does as it is written."""
    return torch.as_strided(step(normalized(G)), (4, 6), (6, 1), 0) * 2


G = matrix(4, 6)
LOOKALIKES: list[Row] = [
    ("a septic", septic, (G,), "is also read by"),
    ("A escapes", a_is_returned, (G,), "A = X X^T of step 1 is also read by output"),
    ("A^2 escapes", a_squared_is_watched, (G,), "a value of step 1 is also read by trace"),
    ("X escapes", x_is_watched, (G,), "X after step 1 is also read by"),
    ("into the input", into_the_parameter, (G,), "it writes into memory that others see"),
    ("into a view", into_what_a_view_sees, (G,), "reads what it writes in place"),
    ("as_strided", read_by_strides, (G,), "as_strided reads memory that X lies in"),
]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    check_lookalike(body, inputs, reason)


SOURCES: list[tuple[str, Body]] = [
    ("a tensor", normalized),
    ("a part of one", lambda G: normalized(G).split(2)[0]),
    ("a row of a list", lambda G: torch._foreach_div([normalized(G), normalized(G)], 2.0)[1]),
]


@pytest.mark.parametrize(("name", "source"), SOURCES, ids=[s[0] for s in SOURCES])
def test_what_gradients_may_flow_through_is_declined(name: str, source: Body) -> None:
    rewritten = Rewritten(lambda G: step(source(G)), G, gradients=True)
    assert rewritten.reasons == ["gradients flow through it, and the operator has none"]


def test_sizes_that_are_not_known_are_declined() -> None:
    rewritten = Rewritten(lambda G: step(normalized(G)), G, symbolic=True)
    assert rewritten.reasons == ["sizes are not known when the graph is compiled"]
