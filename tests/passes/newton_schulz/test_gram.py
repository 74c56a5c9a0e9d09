"""A product of a matrix and its own transpose is found, and no other product."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.newton_schulz.gram import gram_source
from tests.support.newton_schulz.cases import matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized
from tests.support.newton_schulz.lookalikes import (
    SQUARE,
    Body,
    Row,
    check_lookalike,
)

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


def not_transposed(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X
    return a * X + (b * A + c * A @ A) @ X


def a_of_another(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ Y.mT
    return a * X + (b * A + c * A @ A) @ X


def product_in_float32(G: Tensor) -> Tensor:
    X = normalized(G).bfloat16()
    A = (X.float() @ X.float().mT).bfloat16()
    return a * X + (b * A + c * A @ A) @ X


def masked(G: Tensor) -> Tensor:
    X = normalized(G)
    A = torch.tril(X @ X.mT)
    return a * X + (b * A + c * A @ A) @ X


G = matrix(4, 6)
LOOKALIKES: list[Row] = [
    ("X X", not_transposed, (matrix(*SQUARE),), None),
    ("A of another", a_of_another, (G, matrix(4, 6, seed=1)), None),
    ("A in float32", product_in_float32, (G,), None),
    ("tril", masked, (G,), None),
]


@pytest.mark.parametrize(
    ("body", "inputs", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    check_lookalike(body, inputs, reason)


# Name, a function of X [5, 5], and whether its last product is one of a matrix and its transpose.
GRAMS: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
    ("X X^T", lambda X: X @ X.mT, True),
    ("X^T X", lambda X: X.T @ X, True),
    ("of a copy", lambda X: X @ X.clone().mT, True),
    ("transposed twice", lambda X: X.mT.mT @ X.mT, True),
    ("linear", lambda X: F.linear(X, X), True),
    ("linear of a transpose", lambda X: F.linear(X, X.mT), False),
    ("addmm", lambda X: torch.addmm(X, X, X.mT), True),
    ("einsum", lambda X: torch.einsum("ik,jk->ij", X, X), True),
    ("einsum of X X", lambda X: torch.einsum("ik,kj->ij", X, X), False),
    ("tensordot", lambda X: torch.tensordot(X, X, dims=([1], [1])), True),
    ("X X", lambda X: X @ X, False),
    ("of a multiple", lambda X: X @ (2 * X).mT, False),
    ("a part", lambda X: X[:3] @ X.mT, False),
    ("written to between", lambda X: X.clone() @ X.mul_(2).mT, False),
    ("whole numbers", lambda X: X.to(torch.int64) @ X.to(torch.int64).mT, False),
]


@pytest.mark.parametrize(("body", "found"), [g[1:] for g in GRAMS], ids=[g[0] for g in GRAMS])
def test_a_gram_matrix_is_of_one_value_and_its_transpose(
    body: Callable[[Tensor], Tensor], found: bool
) -> None:
    graph = make_fx(lambda X: body(X * 1.0), pre_dispatch=True, tracing_mode="fake")(
        matrix(5, 5)
    ).graph
    (product,) = graph.output_node().all_input_nodes
    assert (gram_source(product, Memory(graph)) is not None) == found
