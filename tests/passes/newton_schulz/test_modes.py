"""Iterations share a call across regions without gradients and across random numbers."""

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import CHANGING, normalized
from tests.support.newton_schulz.programs import Program, assert_computes_the_same, iterate, pairs

pytestmark = pytest.mark.usefixtures("operator_always")


def region_of_a_parameter(*given: Tensor) -> list[Tensor]:
    """As an optimizer that enters torch.no_grad() inside its loop over parameters."""
    for p, g in pairs(given):
        with torch.no_grad():
            p.mul_(0.9).sub_(iterate(normalized(g)))
    return []


def region_of_a_function(*given: Tensor) -> list[Tensor]:
    """Only the iteration is decorated: what is read and made around it needs gradients."""
    orthogonal = torch.no_grad()(lambda g: iterate(normalized(g)))
    return [p * p - 0.1 * orthogonal(p * g) for p, g in pairs(given)]


def region_of_a_step(*given: Tensor) -> list[Tensor]:
    """Gradients are on between two steps, where nothing is computed."""
    for p, g in pairs(given):
        with torch.no_grad():
            X = normalized(g)
        for step in CHANGING:
            with torch.no_grad():
                X = iterate(X, (step,))
        with torch.no_grad():
            p.sub_(X)
    return []


def gradients_on_for_a_moment(*given: Tensor) -> list[Tensor]:
    out = []
    with torch.no_grad():
        for p, g in pairs(given):
            with torch.enable_grad():
                out.append(p * p)
            out.append(p - iterate(normalized(g)))
    return out


def constants_with_gradients_on(*given: Tensor) -> list[Tensor]:
    """What is made of no parameter needs no gradient: steps with and without them share a call."""
    one = iterate(torch.eye(4, 6)) * 2
    with torch.no_grad():
        return [one, iterate(normalized(given[0])) * 2]


def rounded_at_random(*given: Tensor) -> list[Tensor]:
    """A random number after each iteration, as stochastic rounding draws it."""
    for p, g in pairs(given):
        update = iterate(normalized(g))
        p.mul_(0.9).sub_(update + 0.01 * torch.rand_like(update))
    return []


def noise_on_each_gradient(*given: Tensor) -> list[Tensor]:
    return [p - iterate(normalized(g + torch.randn_like(g))) for p, g in pairs(given)]


def drawn_between_steps(*given: Tensor) -> list[Tensor]:
    """A number that has nothing to do with the iteration."""
    out = []
    for p, g in pairs(given):
        X = iterate(normalized(g), CHANGING[:1])
        p.add_(torch.rand_like(p))
        out.append(iterate(X, CHANGING[1:]) * 2)
    return out


TOGETHER = [
    ("region of a parameter", region_of_a_parameter, False),
    ("region of a parameter, gradients on", region_of_a_parameter, True),
    ("region of a function, gradients on", region_of_a_function, True),
    ("region of a step", region_of_a_step, False),
    ("region of a step, gradients on", region_of_a_step, True),
    ("gradients on for a moment", gradients_on_for_a_moment, True),
    ("constants with gradients on", constants_with_gradients_on, True),
    ("rounded at random", rounded_at_random, False),
    ("noise on each gradient", noise_on_each_gradient, False),
    ("drawn between steps", drawn_between_steps, False),
]


@pytest.mark.parametrize(("name", "program", "gradients"), TOGETHER, ids=[r[0] for r in TOGETHER])
def test_two_iterations_become_one_call(name: str, program: Program, gradients: bool) -> None:
    given = [matrix(4, 6, seed=i) for i in range(4)]
    rewritten = Rewritten(program, *given, gradients=gradients)
    assert [(r.count, r.calls, r.action) for r in rewritten.rows] == [(2, 1, "rewritten")]
    assert_computes_the_same(program, rewritten, given, gradients=gradients)


def drawn_after_one_and_before_the_next(*given: Tensor) -> list[Tensor]:
    """The second waits for the first by way of two draws, which keep their order."""
    first = torch.dropout(iterate(normalized(given[0])), 0.5, True)
    return [first, iterate(normalized(torch.dropout(given[1], 0.5, True))) * 2]


def autocast_of_each(*given: Tensor) -> list[Tensor]:
    """Whatever stands in an autocast stays in it, the operator too."""
    out = []
    for p, g in pairs(given):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(p - iterate(normalized(g.bfloat16())))
    return out


APART = [
    ("by way of two draws", drawn_after_one_and_before_the_next, 2),
    ("an autocast of each", autocast_of_each, 2),
]


@pytest.mark.parametrize(("name", "program", "calls"), APART, ids=[r[0] for r in APART])
def test_what_keeps_its_place_keeps_iterations_apart(
    name: str, program: Program, calls: int
) -> None:
    given = [matrix(4, 6, seed=i) for i in range(4)]
    rewritten = Rewritten(program, *given)
    assert [(r.count, r.calls) for r in rewritten.rows] == [(2, calls)]
    assert_computes_the_same(program, rewritten, given, tolerance=0.06)


def test_steps_with_gradients_do_not_join_those_without() -> None:
    """The second is the first's look-alike, but its input needs a gradient."""

    def program(*given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = iterate(normalized(given[0])) * 2
        return [first, iterate(normalized(given[0] * 3)) * 2]

    given = [matrix(4, 6, seed=i) for i in range(2)]
    rewritten = Rewritten(program, *given, gradients=True)
    assert [(r.action, r.count, r.calls) for r in rewritten.rows] == [
        ("rewritten", 1, 1),
        ("declined", 1, 0),
    ]
    assert rewritten.reasons[1] == "gradients flow through it, and the operator has none"
    assert_computes_the_same(program, rewritten, given, gradients=True)


def test_what_processes_do_together_keeps_its_order() -> None:
    """Others may run another graph: they would wait for one another for ever."""
    all_reduce = torch.ops._c10d_functional.all_reduce.default

    def program(*given: Tensor) -> list[Tensor]:
        first = all_reduce(iterate(normalized(given[0])) * 1, "sum", "0")
        second = all_reduce(given[1] * 2, "sum", "0")
        return [first, second, iterate(normalized(given[2])) * 2]

    rewritten = Rewritten(program, *[matrix(4, 6, seed=i) for i in range(3)])
    assert len(rewritten.calls) == 1
    (output,) = (n for n in rewritten.gm.graph.nodes if n.op == "output")
    order = [n for n in rewritten.gm.graph.nodes if n.target is all_reduce]
    assert order == output.args[0][:2]  # type: ignore[index]


def test_the_mode_that_a_step_leaves_behind_stays() -> None:
    def program(*given: Tensor) -> list[Tensor]:
        out = []
        for p, g in pairs(given):
            torch.set_grad_enabled(False)
            out.append(p - iterate(normalized(g)))
            torch.set_grad_enabled(True)
        torch.set_grad_enabled(False)
        return out

    given = [matrix(4, 6, seed=i) for i in range(4)]
    rewritten = Rewritten(program, *given, gradients=True)
    assert len(rewritten.calls) == 1
    with torch.enable_grad():
        rewritten(*given)
        assert not torch.is_grad_enabled()
