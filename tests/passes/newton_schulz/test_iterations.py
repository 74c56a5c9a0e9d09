"""Iterations side by side: what one is, or what lies within it, is no matter of the others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moonfx.passes.newton_schulz import iterations
from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import CHANGING, QUINTIC, normalized
from tests.support.newton_schulz.programs import assert_computes_the_same, iterate

Body = Callable[..., list[Tensor]]

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("operator_always")


def before_a_copy(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    gram = (X @ X.T).square().sum()
    return [iterate(X.clone()) * 2, gram, iterate(normalized(H)) * 2]


def before_a_turn(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    gram = (X @ X.T).square().sum()
    return [iterate(X.T.contiguous()) * 2, gram, iterate(normalized(H).T.contiguous()) * 2]


def before_a_cast(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    gram = (X @ X.T).square().sum()
    return [iterate(X.to(torch.float32, copy=True)) * 2, gram, iterate(normalized(H)) * 2]


def after(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    out = iterate(X.clone()) * 2
    return [out, (X @ X.T).square().sum(), iterate(normalized(H)) * 2]


def of_one_matrix(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    return [iterate(X) * 2, iterate(X) * 3, iterate(X, (QUINTIC,) * 3) * 4]


def of_one_matrix_one_step(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    return [iterate(X, CHANGING[:1]) * 2, iterate(X, (QUINTIC,)) * 4]


def one_gram_matrix_for_two(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    A = X @ X.mT
    sums = [a * X + (b * A + c * A @ A) @ X for a, b, c in CHANGING[:2]]
    return [each * 2 for each in sums] + [iterate(normalized(H)) * 2]


def among_readers(G: Tensor, H: Tensor) -> list[Tensor]:
    X = normalized(G)
    read = [X * float(i) for i in range(300)]
    return [iterate(X) * 2, iterate(normalized(H)) * 2, *read]


def infinite(G: Tensor, H: Tensor) -> list[Tensor]:
    return [iterate(normalized(G), ((float("inf"), 1.0, 1.0),)), iterate(normalized(H)) * 2]


def split(X: Tensor, between: Callable[[], object]) -> Tensor:
    a, b, c = CHANGING[0]
    A = X @ X.mT
    between()
    return a * X + (b * A + c * A @ A) @ X


def an_assertion_inside(G: Tensor, H: Tensor) -> list[Tensor]:
    def between() -> None:
        aten._assert_async.msg(G.sum() != 12345.0, "other data")

    return [split(normalized(G), between) * 2, iterate(normalized(H)) * 2, iterate(normalized(G))]


def an_autocast_inside(G: Tensor, H: Tensor) -> list[Tensor]:
    def between() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            G.mul(2)

    return [split(normalized(G), between) * 2, iterate(normalized(H)) * 2, iterate(normalized(G))]


# name, program; how many are rewritten, to how many calls, and how many are declined
ALONE: list[tuple[str, Body, tuple[int, int, int]]] = [
    ("a Gram matrix is read before a copy", before_a_copy, (2, 1, 0)),
    ("before a turned copy", before_a_turn, (2, 2, 0)),
    ("before a cast", before_a_cast, (2, 1, 0)),
    ("and after it", after, (2, 1, 0)),
    ("three of one matrix", of_one_matrix, (3, 2, 0)),
    ("two of one matrix, of one step", of_one_matrix_one_step, (2, 2, 0)),
    ("one Gram matrix for two", one_gram_matrix_for_two, (1, 1, 2)),
    ("one of 300 readers", among_readers, (2, 1, 0)),
    ("an infinite coefficient", infinite, (1, 1, 1)),
    ("an assertion inside the first", an_assertion_inside, (2, 2, 1)),
    ("an autocast inside the first", an_autocast_inside, (2, 2, 1)),
]


@pytest.mark.parametrize(("name", "body", "found"), ALONE, ids=[r[0] for r in ALONE])
def test_what_keeps_one_iteration_as_written_keeps_no_other(
    name: str, body: Body, found: tuple[int, int, int]
) -> None:
    given = [matrix(4, 6, seed=1), matrix(4, 6, seed=2)]
    rewritten = Rewritten(body, *given)
    assert rewritten.failures == []
    declined = sum(r.count for r in rewritten.rows if r.action == "declined")
    assert (rewritten.count, len(rewritten.calls), declined) == found
    if body is not infinite:  # it gives no numbers
        assert_computes_the_same(body, rewritten, given)


def test_a_graph_stays_whole_where_an_iteration_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were two ever found to share nodes, the graph would be as it was, and say so."""
    monkeypatch.setattr(iterations, "_distinct", lambda found: found)
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)
    given = [matrix(4, 6, seed=1), matrix(4, 6, seed=2)]
    rewritten = Rewritten(before_a_copy, *given)
    assert (rewritten.count, rewritten.calls, len(rewritten.failures)) == (0, [], 1)
    assert_computes_the_same(before_a_copy, rewritten, given)


def test_memory_that_the_next_iteration_writes_is_not_said_to_be_read() -> None:
    def body(G: Tensor, H: Tensor) -> list[Tensor]:
        gram, out = torch.empty(4, 4), []
        for X in (normalized(G), normalized(H)):
            a, b, c = CHANGING[0]
            A = torch.mm(X, X.mT, out=gram)
            out.append(torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a) * 2)
        return out

    given = [matrix(4, 6, seed=1), matrix(4, 6, seed=2)]
    rewritten = Rewritten(body, *given)
    assert "A = X X^T of step 1 is also written to by mm" in rewritten.reasons
    assert rewritten.count == 1
    assert_computes_the_same(body, rewritten, given)
