"""What looks like a Newton-Schulz iteration and is not, or not provably: left as it was written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.newton_schulz import operator_call
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized, step

aten = torch.ops.aten
a, b, c = QUINTIC
Body = Callable[..., Any]


@pytest.fixture(autouse=True)
def operator_always(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)


def cubic(G: Tensor) -> Tensor:
    X = normalized(G)
    for _ in range(3):
        X = 1.5 * X - 0.5 * (X @ X.mT) @ X
    return X


def septic(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    B = A @ A
    return a * X + b * A @ X + c * B @ X - 0.5 * (B @ A) @ X


def without_the_cube(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + c * A @ A @ X


def without_x(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return (b * A + c * A @ A) @ X


def not_transposed(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X
    return a * X + (b * A + c * A @ A) @ X


def coefficient_in_a_tensor(G: Tensor, k: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (k * A + c * A @ A) @ X


def one_coefficient_per_row(G: Tensor, k: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X + (b * A + c * (A * k) @ A) @ X


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


def a_of_the_last_x(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X = a * X + b * A @ X
    return a * X + (b * A + c * A @ A) @ X


def x_of_the_last_step(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    Y = a * X + (b * A + c * A @ A) @ X
    A = Y @ Y.mT
    return a * Y + (b * A + c * A @ A) @ X


def a_of_another(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ Y.mT
    return a * X + (b * A + c * A @ A) @ X


def times_another(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ Y


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


def product_in_float32(G: Tensor) -> Tensor:
    X = normalized(G).bfloat16()
    A = (X.float() @ X.float().mT).bfloat16()
    return a * X + (b * A + c * A @ A) @ X


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


def masked(G: Tensor) -> Tensor:
    X = normalized(G)
    A = torch.tril(X @ X.mT)
    return a * X + (b * A + c * A @ A) @ X


def a_row_is_broadcast(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return a * X[:1] + (b * A + c * A @ A) @ X


def batch_is_broadcast(G: Tensor, H: Tensor) -> Tensor:
    X, Y = normalized(G), normalized(H)
    A = X @ X.mT
    return a * Y + (b * A + c * A @ A) @ X


def written_between(G: Tensor, H: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X.add_(H)
    return a * X + (b * A + c * A @ A) @ X


def written_through_a_view(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    X[0].zero_()
    return a * X + (b * A + c * A @ A) @ X


def a_is_written_through_a_view(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    A.diagonal(1).add_(1e-3)
    return a * X + (b * A + c * A @ A) @ X


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


def entries_of_identities(G: Tensor) -> Tensor:
    """[4, 2, 2] of ones and zeros, and no matrix of them the identity."""
    X = normalized(G)
    A = X @ X.mT
    return (a * torch.eye(4).reshape(4, 2, 2) + b * A + c * A @ A) @ X


def a_one_is_repeated(G: Tensor) -> Tensor:
    X = normalized(G)
    A = X @ X.mT
    return (a * torch.eye(1).expand(4, 4) + b * A + c * A @ A) @ X


def read_by_strides(G: Tensor) -> Tensor:
    """An offset counts from where the memory starts, which is where X does as it is written."""
    return torch.as_strided(step(normalized(G)), (4, 6), (6, 1), 0) * 2


def autocast_between_steps(G: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the autocast and of the operator's call cannot both be kept."""
    X = normalized(G)
    A = X @ X.mT
    with torch.autocast("cpu", torch.bfloat16):
        seen = G.sum()
    return a * X + (b * A + c * A @ A) @ X, seen


ELSE = "something else than X comes in"
G = matrix(4, 6)
SQUARE = matrix(5, 5)
K = torch.tensor(-4.7)
# name, function, inputs, the reason; None where nothing in it is like a step
LOOKALIKES: list[tuple[str, Body, tuple[Tensor, ...], str | None]] = [
    ("a cubic", cubic, (G,), "a cubic step: the operator's has A^2"),
    ("a septic", septic, (G,), "is also read by"),
    ("no cube", without_the_cube, (G,), "a step without the term b A X"),
    ("no X", without_x, (G,), "is not formed of A = X X^T"),
    ("X X", not_transposed, (SQUARE,), None),
    ("a tensor's coefficient", coefficient_in_a_tensor, (G, K), "a coefficient is a tensor"),
    ("a coefficient per row", one_coefficient_per_row, (G, matrix(4, 1)), "entry by entry"),
    ("A escapes", a_is_returned, (G,), "A = X X^T of step 1 is also read by output"),
    ("A^2 escapes", a_squared_is_watched, (G,), "a value of step 1 is also read by trace"),
    ("X escapes", x_is_watched, (G,), "X after step 1 is also read by"),
    ("A of the last X", a_of_the_last_x, (G,), "is not formed of A = X X^T"),
    ("X of the last step", x_of_the_last_step, (G,), ELSE),
    ("A of another", a_of_another, (G, matrix(4, 6, seed=1)), None),
    ("times another", times_another, (G, matrix(4, 6, seed=1)), ELSE),
    ("A * A", entry_by_entry, (SQUARE,), None),
    ("A^3", a_cubed, (G,), None),
    ("a cast in the middle", cast_in_the_middle, (G,), "the dtype changes inside the step"),
    ("A in float32", product_in_float32, (G,), None),
    ("dropout", dropout, (G,), "dropout inside the step"),
    ("noise", noise, (G,), ELSE),
    ("a number added", ridge, (G,), "a number is added to every entry"),
    ("clamped", clamped, (G,), "clamp inside the step"),
    ("tril", masked, (G,), None),
    ("a row of X", a_row_is_broadcast, (G,), "a row or column is broadcast"),
    ("a batch", batch_is_broadcast, (G, matrix(3, 4, 6)), ELSE),
    ("X written", written_between, (G, matrix(4, 6, seed=1)), ELSE),
    ("X written by a view", written_through_a_view, (G,), ELSE),
    ("A written by a view", a_is_written_through_a_view, (G,), ELSE),
    ("into the input", into_the_parameter, (G,), "it writes into memory that others see"),
    ("into a view", into_what_a_view_sees, (G,), "reads what it writes in place"),
    ("entries of identities", entries_of_identities, (matrix(4, 2, 3),), ELSE),
    ("a 1 is repeated", a_one_is_repeated, (G,), ELSE),
    ("as_strided", read_by_strides, (G,), "as_strided reads memory that X lies in"),
    ("an autocast between", autocast_between_steps, (G,), "_enter_autocast keeps its place"),
]


@pytest.mark.parametrize(
    ("name", "body", "inputs", "reason"), LOOKALIKES, ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_stays_as_it_was_written(
    name: str, body: Body, inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    rewritten = Rewritten(body, *inputs)
    assert rewritten.calls == []
    assert [n for n in rewritten.targets if n not in rewritten.before] == []
    assert [row.action for row in rewritten.rows] == ([] if reason is None else ["declined"])
    assert all(reason in found for found in rewritten.reasons if reason is not None)


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


@pytest.mark.parametrize("at", [1, 2])
def test_an_exception_in_the_pass_leaves_the_graph_as_it_was_and_other_passes_work(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens: here where a call's operands, or another call, are written already."""
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)
    insert, written = operator_call.insert, 0

    def failing(target: Any, *rest: Any) -> torch.fx.Node:
        nonlocal written
        written += target is operator_call.OPERATOR
        if target is operator_call.OPERATOR and written == at:
            raise AttributeError("a bug")
        return insert(target, *rest)

    monkeypatch.setattr(operator_call, "insert", failing)

    def both(G: Tensor, H: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        one, two, small = (step(normalized(x)) * 2 for x in (G, H, H[:3]))
        return one, two, small, attended

    inputs = (G, matrix(4, 6, seed=1), matrix(1, 2, 8, 4))
    rewritten = Rewritten(both, *inputs)
    assert (rewritten.count, rewritten.rows, rewritten.calls) == (1, [], [])
    assert not {aten.stack.default, aten.unbind.int} & set(rewritten.targets)
    assert rewritten.failures == ["newton_schulz: AttributeError: a bug"]
    for ours, theirs in zip(rewritten(*inputs)[:3], both(*inputs)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


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
