"""What every operator that multiplies matrices makes of polynomials in X, and what it does not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.newton_schulz.matmuls import einsum_chain, flops
from tests.support.newton_schulz.cases import matrix
from tests.support.newton_schulz.forms import QUINTIC
from tests.support.newton_schulz.lookalikes import (
    BROADCAST,
    ELSE,
    SQUARE,
    TENSOR,
    Near,
    check_near,
)
from tests.support.newton_schulz.spellings import BATCH, MATRIX, Spelling, plain

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


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


def addmm_of_something(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, torch.addmm(X.new_ones(4, 4), X, X.t()), a, b, c)


def addmm_of_memory_not_written(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X, torch.addmm(torch.empty(4, 4), X, X.t()), a, b, c)


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


def batch_dims_crossed(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """Each matrix is multiplied by every A."""
    A = X @ X.mT
    return a * X + ((b * A + c * A @ A).unsqueeze(1) @ X.unsqueeze(0)).sum(0)


NEAR: list[Near] = [
    ("inner, X X", inner_of_a_transpose, SQUARE, None),
    ("inner, batched", inner_of_a_batch, BATCH, None),
    ("tensordot, X^T X^T", tensordot_of_the_wrong_dims, SQUARE, None),
    ("tensordot, a number", tensordot_of_both_dims, MATRIX, TENSOR),
    ("addmm, ones", addmm_of_something, MATRIX, ELSE),
    ("addmm, empty", addmm_of_memory_not_written, MATRIX, ELSE),
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
    ("batch dims crossed", batch_dims_crossed, BATCH, BROADCAST),
]


@pytest.mark.parametrize(
    ("step", "shape", "reason"), [n[1:] for n in NEAR], ids=[n[0] for n in NEAR]
)
def test_what_is_nearly_a_spelling_of_a_step_stays_as_it_was_written(
    step: Spelling, shape: tuple[int, ...], reason: str | None
) -> None:
    check_near(step, shape, reason)


# An equation, and the operands in the order of the product, each with whether it is transposed.
EQUATIONS: list[tuple[str, list[tuple[int, bool]] | None]] = [
    ("ij,jk->ik", [(0, False), (1, False)]),
    ("ik,jk->ij", [(0, False), (1, True)]),
    ("ji,jk->ik", [(0, True), (1, False)]),
    ("ij,kj,kl->il", [(0, False), (1, True), (2, False)]),
    ("jk,ij->ik", [(1, False), (0, False)]),
    ("ij,jk->ki", [(1, True), (0, True)]),
    ("ij,jk", [(0, False), (1, False)]),
    ("kj,ji", [(1, True), (0, True)]),  # letters of a result are in the alphabet's order
    ("...ij,...jk->...ik", [(0, False), (1, False)]),
    ("bij,bjk->bik", [(0, False), (1, False)]),
    ("ij,ij->ij", None),
    ("ij,jk->i", None),
    ("bij,bjk->ik", None),
    ("ij,jj,jk->ik", None),
    ("ij,kl->il", None),
    ("ii,ij->ij", None),
]


@pytest.mark.parametrize(("equation", "order"), EQUATIONS, ids=[e[0] for e in EQUATIONS])
def test_an_einsum_is_read_as_the_product_that_its_letters_say(
    equation: str, order: list[tuple[int, bool]] | None
) -> None:
    assert einsum_chain(equation) == order


# Name, products of X [4, 6], and the FLOPs of each product in it: 2 m k n.
COUNTED: list[tuple[str, Callable[[Tensor], Tensor], int]] = [
    ("matmul", lambda X: X @ X.mT, 2 * 4 * 6 * 4),
    ("of a batch", lambda X: torch.bmm(X.expand(3, 4, 6), X.mT.expand(3, 6, 4)), 3 * 2 * 4 * 6 * 4),
    ("addmm", lambda X: torch.addmm(X.new_zeros(4, 4), X, X.mT), 2 * 4 * 6 * 4),
    ("linear", lambda X: F.linear(X, X), 2 * 4 * 6 * 4),
    ("inner", lambda X: torch.inner(X.mT, X.mT), 2 * 6 * 4 * 6),
    ("tensordot", lambda X: torch.tensordot(X, X, dims=([0], [0])), 2 * 6 * 4 * 6),
    ("matrix_power", lambda X: torch.linalg.matrix_power(X[:, :4], 2), 2 * 4 * 4 * 4),
    ("multi_dot", lambda X: torch.linalg.multi_dot([X, X.mT, X]), 2 * 4 * 6 * 4 + 2 * 4 * 4 * 6),
    ("einsum", lambda X: torch.einsum("ij,kj,kl->il", X, X, X), 2 * 4 * 6 * 4 + 2 * 4 * 4 * 6),
    ("no product", lambda X: X * X, 0),
]


@pytest.mark.parametrize(("body", "count"), [x[1:] for x in COUNTED], ids=[x[0] for x in COUNTED])
def test_flops_of_products_are_counted_however_they_are_written(
    body: Callable[[Tensor], Tensor], count: int
) -> None:
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(matrix(4, 6))
    assert sum(flops(n) for n in gm.graph.nodes if n.op == "call_function") == count
