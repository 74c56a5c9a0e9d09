"""Lists and writes to diagonals are taken apart, and put back where no iteration holds them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.newton_schulz import decomposition
from moonfx.passes.newton_schulz.decomposition import Decomposition
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized

aten = torch.ops.aten
Body = Callable[..., list[Tensor]]
GIVEN = (matrix(4, 6), matrix(4, 6, seed=1))


def lists_then_diagonals(*Gs: Tensor) -> list[Tensor]:
    """(c A + b I) A + a I, times X: numbers are added to the diagonals of a list's rows."""
    a, b, c = QUINTIC
    Xs = [normalized(G) for G in Gs]
    As = [X @ X.mT for X in Xs]
    Ys = torch._foreach_mul(As, c)
    for Y in Ys:
        Y.diagonal(dim1=-2, dim2=-1).add_(b)
    Ys = [Y @ A for Y, A in zip(Ys, As)]
    for Y in Ys:
        Y.diagonal(dim1=-2, dim2=-1).add_(a)
    return list(torch._foreach_mul([Y @ X for Y, X in zip(Ys, Xs)], 2.0))


def lists_in_place_then_diagonals(*Gs: Tensor) -> list[Tensor]:
    a, b, c = QUINTIC
    Xs = [normalized(G) for G in Gs]
    As = [X @ X.mT for X in Xs]
    Ys = [A * 1.0 for A in As]
    torch._foreach_mul_(Ys, c)
    for Y in Ys:
        Y.diagonal(dim1=-2, dim2=-1).add_(b)
    Ys = [Y @ A for Y, A in zip(Ys, As)]
    torch._foreach_mul_(Ys, 0.5)
    for Y in Ys:
        Y.diagonal(dim1=-2, dim2=-1).add_(a / 2)
    return [Y @ X * 2.0 for Y, X in zip(Ys, Xs)]


def diagonals_then_lists(*Gs: Tensor) -> list[Tensor]:
    a, b, c = QUINTIC
    Xs = [normalized(G) for G in Gs]
    As = [X @ X.mT for X in Xs]
    Ys = [c * A for A in As]
    for Y in Ys:
        Y.diagonal(dim1=-2, dim2=-1).add_(b)
    Ys = torch._foreach_mul(Ys, 1.0)
    return [a * X + Y @ A @ X for Y, A, X in zip(Ys, As, Xs)]


PROGRAMS = [lists_then_diagonals, lists_in_place_then_diagonals, diagonals_then_lists]
every_program = pytest.mark.parametrize("body", PROGRAMS, ids=lambda body: body.__name__)


def traced(body: Body) -> fx.GraphModule:
    return make_fx(body, pre_dispatch=True, tracing_mode="fake")(*GIVEN)


def targets(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes]


def written(gm: fx.GraphModule) -> list[Any]:
    """What of a graph is to be decomposed."""
    of = (aten._foreach_mul.Scalar, aten._foreach_mul_.Scalar, aten.diagonal.default)
    return [target for target in targets(gm) if target in of]


def assert_computes_the_same(gm: fx.GraphModule, body: Body) -> None:
    gm.graph.lint()
    gm.recompile()
    for ours, theirs in zip(gm(*GIVEN), body(*GIVEN), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@every_program
def test_neither_list_nor_write_is_left_and_the_graph_computes_the_same(body: Body) -> None:
    gm = traced(body)
    assert len(written(gm)) > 0
    found = Decomposition(gm.graph, True)
    assert found
    assert aten.diagonal.default not in written(gm)
    assert all(n in found.memory.position for n in gm.graph.nodes)
    assert_computes_the_same(gm, body)


@every_program
def test_what_is_not_kept_is_as_it_was_written(body: Body) -> None:
    gm = traced(body)
    before = Counter(targets(gm))
    found = Decomposition(gm.graph, True)
    found.restore(set())
    assert not found
    assert Counter(targets(gm)) == before
    assert all(n in found.memory.position for n in gm.graph.nodes)  # the memory of now
    assert_computes_the_same(gm, body)


@every_program
@pytest.mark.parametrize("keep", [0, 1])
def test_what_is_kept_stays_beside_what_is_restored(body: Body, keep: int) -> None:
    """Every other node is kept, and then none, as where the cost model is asked again."""
    gm = traced(body)
    found = Decomposition(gm.graph, True)
    found.restore(set(list(gm.graph.nodes)[keep::2]))
    assert_computes_the_same(gm, body)
    found.restore(set())
    assert aten.eye.default not in targets(gm)
    assert_computes_the_same(gm, body)


@every_program
def test_a_node_that_is_no_more_has_one_that_stands_for_it(body: Body) -> None:
    gm = traced(body)
    found = Decomposition(gm.graph, True)
    read = [n for n in gm.graph.nodes if n.users]
    found.restore(set())
    alive = set(gm.graph.nodes)
    gone = [n for n in read if n not in alive and n.target is not aten.eye.default]
    assert gone
    assert all(found.current(n) in alive for n in gone)


def test_a_graph_without_any_is_left_alone() -> None:
    gm = make_fx(lambda X: X @ X.mT, pre_dispatch=True, tracing_mode="fake")(GIVEN[0])
    before = targets(gm)
    assert not Decomposition(gm.graph, True)
    assert targets(gm) == before


def test_diagonals_are_writes_again_where_lists_cannot_be_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("no rows")

    body = lists_then_diagonals
    gm = traced(body)
    before = Counter(targets(gm))
    monkeypatch.setattr(decomposition, "Rows", fail)
    with pytest.raises(ValueError, match="no rows"):
        Decomposition(gm.graph, True)
    assert Counter(targets(gm)) == before
    assert_computes_the_same(gm, body)


@every_program
def test_what_the_cost_model_leaves_is_as_it_was_written(
    body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "plain")
    rewritten = Rewritten(body, *GIVEN)
    assert {r.action for r in rewritten.rows} == {"left"}
    assert Counter(rewritten.targets) == Counter(rewritten.before)
    for ours, theirs in zip(rewritten(*GIVEN), body(*GIVEN), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
