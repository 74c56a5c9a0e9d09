"""One call for several iterations: results as they lay, and the graph whole where it fails."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.newton_schulz import operator_call
from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized, step
from tests.support.newton_schulz.lookalikes import Body
from tests.support.newton_schulz.programs import assert_computes_the_same, iterate

aten = torch.ops.aten
a, b, c = QUINTIC


pytestmark = pytest.mark.usefixtures("operator_always")


@torch.no_grad()
def made(*given: Tensor) -> list[Tensor]:
    return [iterate(normalized(x)) for x in given]


def written_to(G: Tensor, H: Tensor) -> list[Tensor]:
    """The results are scaled in place by a number that learns."""
    found, rate = made(G, H), G.sum()
    return [x.mul_(rate) * 2 for x in found]


def written_to_by_a_view(G: Tensor, H: Tensor) -> list[Tensor]:
    found, rate = made(G, H), G.sum()
    for x in found:
        x.view(-1)[2:].mul_(rate)
    return [x * 2 for x in found]


def detached_in_place(G: Tensor, H: Tensor) -> list[Tensor]:
    return [x.detach_() * 2 for x in made(G, H)]


def returned_batches(G: Tensor, H: Tensor) -> list[Tensor]:
    return made(G.reshape(1, 2, 2, 6), H.reshape(1, 2, 2, 6))


SEEN: list[tuple[str, Body, int]] = [
    ("written to", written_to, 1),
    ("written to by a view", written_to_by_a_view, 1),
    ("detached in place", detached_in_place, 1),
    ("returned", returned_batches, 2),
]


@pytest.mark.parametrize(("name", "body", "calls"), SEEN, ids=[r[0] for r in SEEN])
def test_no_result_is_seen_to_be_a_view(name: str, body: Body, calls: int) -> None:
    """Autograd lets no view be written to that was made without it, or together with others."""
    given = [matrix(4, 6, seed=1), matrix(4, 6, seed=2)]
    rewritten = Rewritten(body, *given, gradients=True)
    assert (rewritten.count, len(rewritten.calls)) == (2, calls)
    assert_computes_the_same(body, rewritten, given, gradients=True)
    with torch.no_grad():
        assert not any(x._is_view() for x in rewritten(*given))


def test_results_written_to_without_gradients_are_not_copied() -> None:
    def body(G: Tensor, H: Tensor) -> list[Tensor]:
        return [iterate(normalized(x)).mul_(0.5) * 2 for x in (G, H)]

    rewritten = Rewritten(body, matrix(4, 6, seed=1), matrix(4, 6, seed=2))
    assert rewritten.count == 2
    assert aten.clone.default not in rewritten.targets


G = matrix(4, 6)


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


def test_matrices_are_stacked_and_batches_joined_for_one_call() -> None:
    def body(*given: Tensor) -> list[Tensor]:
        return [iterate(normalized(x)) * 2 for x in given]

    stacked = Rewritten(body, matrix(4, 6), matrix(4, 6, seed=1))
    assert (len(stacked.calls), stacked.calls[0].args[0].meta["val"].shape) == (1, (2, 4, 6))
    assert {aten.stack.default, aten.unbind.int} <= set(stacked.targets)
    joined = Rewritten(body, matrix(3, 4, 6), matrix(1, 4, 6))
    assert (len(joined.calls), joined.calls[0].args[0].meta["val"].shape) == (1, (4, 4, 6))
    assert {aten.cat.default, aten.split_with_sizes.default} <= set(joined.targets)
    alone = Rewritten(body, matrix(4, 6))
    assert not {aten.stack.default, aten.cat.default} & set(alone.targets)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 4, 6)], ids=str)
def test_a_result_lies_in_memory_as_the_iteration_left_it(shape: tuple[int, ...]) -> None:
    def rows(G: Tensor) -> Tensor:
        return iterate(normalized(G))

    def columns(G: Tensor) -> Tensor:
        return iterate(normalized(G.mT)).mT

    for body in (rows, columns):
        G = matrix(*shape)
        rewritten = Rewritten(body, G)
        assert rewritten.count == 1
        assert rewritten(G).stride() == body(G).stride()
