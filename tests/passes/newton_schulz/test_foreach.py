"""Iterations over lists of matrices (torch._foreach_*): each row is one, and no list is broken up
for nothing."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moonfx
import moonfx.ops.newton_schulz as operator
from tests.frontends.test_optimizer_steps import steps
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import CHANGING, QUINTIC, normalized

Body = Callable[..., list[Tensor]]
GIVEN = [matrix(4, 6, seed=1), matrix(4, 6, seed=2), matrix(6, 4, seed=3)]


pytestmark = pytest.mark.usefixtures("operator_always")


def products(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [x @ y for x, y in zip(left, right, strict=True)]


def grams(Xs: list[Tensor]) -> list[Tensor]:
    return [X @ X.mT for X in Xs]


def step(Xs: list[Tensor], a: float, b: float, c: float) -> list[Tensor]:
    As = grams(Xs)
    Bs = torch._foreach_add(torch._foreach_mul(As, b), torch._foreach_mul(products(As, As), c))
    return list(torch._foreach_add(torch._foreach_mul(Xs, a), products(list(Bs), Xs)))


def new_lists(*Gs: Tensor) -> list[Tensor]:
    Xs = [normalized(G) for G in Gs]
    for numbers in CHANGING:
        Xs = step(Xs, *numbers)
    return list(torch._foreach_mul(Xs, 2.0))


def in_place(*Gs: Tensor) -> list[Tensor]:
    Xs = [normalized(G) for G in Gs]
    for a, b, c in CHANGING:
        As = grams(Xs)
        Bs = products(As, As)
        torch._foreach_mul_(Bs, c)
        torch._foreach_add_(Bs, As, alpha=b)
        Ys = products(Bs, Xs)
        torch._foreach_mul_(Xs, [a] * len(Xs))
        torch._foreach_add_(Xs, Ys)
    return [X * 2 for X in Xs]


def copied_back(*Gs: Tensor) -> list[Tensor]:
    Xs = [normalized(G) for G in Gs]
    for numbers in CHANGING:
        torch._foreach_copy_(Xs, step(list(torch._foreach_clone(Xs)), *numbers))
    return [X * 2 for X in Xs]


def other_sums(*Gs: Tensor) -> list[Tensor]:
    """Every operator on lists that is left: sub, neg, div, lerp, numbers by row."""
    Xs = list(torch._foreach_div([normalized(G) for G in Gs], 1.0))
    for a, b, c in CHANGING:
        As = grams(Xs)
        Bs = torch._foreach_lerp(As, products(As, As), c / (b + c))
        torch._foreach_div_(Bs, [1 / (b + c)] * len(Xs))
        Ys = torch._foreach_neg(products(list(Bs), Xs))
        Xs = list(torch._foreach_sub(torch._foreach_mul(Xs, a), Ys))
    return list(torch._foreach_mul(Xs, 2.0))


def products_of_lists(*Gs: Tensor) -> list[Tensor]:
    """torch._foreach_mm, new in torch 2.13."""
    Xs = [normalized(G) for G in Gs]
    for a, b, c in CHANGING:
        As = torch._foreach_mm(Xs, [X.mT for X in Xs])
        Bs = torch._foreach_mul(As, b)
        torch._foreach_add_(Bs, torch._foreach_mm(As, As), alpha=c)
        Xs = torch._foreach_add(torch._foreach_mm(Bs, Xs), torch._foreach_mul(Xs, a))
    return list(torch._foreach_mul(Xs, 2.0))


LISTS: list[tuple[str, Body]] = [
    ("new lists", new_lists),
    ("in place", in_place),
    ("copied back", copied_back),
    ("sub, neg, div, lerp", other_sums),
    *([("_foreach_mm", products_of_lists)] if hasattr(torch, "_foreach_mm") else []),
]


def foreach(targets: list[Any]) -> Counter[str]:
    names = [str(t).split(".")[1] for t in targets if "_foreach_" in str(t)]
    return Counter(n.removeprefix("_foreach_") for n in names)


@pytest.mark.parametrize(("name", "body"), LISTS, ids=[r[0] for r in LISTS])
def test_each_row_of_a_list_is_an_iteration(name: str, body: Body) -> None:
    rewritten = Rewritten(body, *GIVEN)
    found = [(r.shape, r.count, r.calls, r.steps, r.action) for r in rewritten.rows]
    assert found == [((4, 6), 2, 1, 3, "rewritten"), ((6, 4), 1, 1, 3, "rewritten")]
    for row in rewritten.rows:
        torch.testing.assert_close(torch.tensor(row.coefficients), torch.tensor(CHANGING))
    assert foreach(rewritten.targets) <= Counter(["mul", "div", "clone"])  # X_0's and the result's
    for ours, theirs in zip(rewritten(*GIVEN), body(*(g.clone() for g in GIVEN)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)  # see test_newton_schulz


def test_a_whole_step_on_lists_keeps_those_before_and_after_the_iteration() -> None:
    def body(*given: Tensor) -> list[Tensor]:
        weights, momenta, gradients = ([x * 1 for x in given[i::3]] for i in range(3))
        torch._foreach_lerp_(momenta, gradients, 0.1)
        updates = torch._foreach_lerp(gradients, momenta, 0.9)
        Xs = list(torch._foreach_div(updates, torch._foreach_norm(updates)))
        for _ in range(3):
            Xs = step(Xs, *QUINTIC)
        torch._foreach_mul_(weights, 0.9)
        torch._foreach_add_(weights, Xs, alpha=-0.1)
        return [*weights, *momenta]

    given = [matrix(4, 6, seed=i) for i in range(6)]
    rewritten = Rewritten(body, *given)
    assert [(r.count, r.calls, r.steps) for r in rewritten.rows] == [(2, 1, 3)]
    assert foreach(rewritten.targets) == Counter(["lerp_", "lerp", "norm", "div", "mul_", "add_"])
    for ours, theirs in zip(rewritten(*given), body(*given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)  # see test_newton_schulz


def test_rows_that_are_no_iteration_stay_lists_where_they_are_more_than_one() -> None:
    """The last two rows of each list are cubes of X, which the operator has not."""

    def body(*Gs: Tensor) -> list[Tensor]:
        Xs = [normalized(G) for G in Gs]
        a, b, c = QUINTIC
        As = grams(Xs)
        Bs = torch._foreach_mul(As, b)
        torch._foreach_add_(Bs[:2], products(As[:2], As[:2]), alpha=c)
        return list(torch._foreach_add(torch._foreach_mul(Xs, a), products(list(Bs), Xs)))

    given = [matrix(4, 6, seed=i) for i in range(4)]
    rewritten = Rewritten(body, *given)
    assert sorted((r.count, r.action) for r in rewritten.rows) == [
        (2, "declined"),
        (2, "rewritten"),
    ]
    kept = [n for n in rewritten.gm.graph.nodes if "_foreach_" in str(n.target)]
    assert [len(n.args[0]) for n in kept] == [2, 2, 2]
    for ours, theirs in zip(rewritten(*given), body(*given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)  # see test_newton_schulz


def one(Xs: list[Tensor], change: Callable[[list[Tensor]], Any]) -> list[Tensor]:
    """One step on lists, with something done to the list of A between."""
    As, (a, b, c) = grams(Xs), QUINTIC
    change(As)
    Bs = torch._foreach_add(torch._foreach_mul(As, b), products(As, As), alpha=c)
    return list(torch._foreach_add(torch._foreach_mul(Xs, a), products(list(Bs), Xs)))


def entries(*Gs: Tensor) -> list[Tensor]:
    return one([normalized(G) for G in Gs], lambda As: torch._foreach_mul_(As, list(As)))


def a_number_added(*Gs: Tensor) -> list[Tensor]:
    return one([normalized(G) for G in Gs], lambda As: torch._foreach_add_(As, 1e-3))


def a_tensor_times(*Gs: Tensor) -> list[Tensor]:
    k = Gs[0].norm()
    return one([normalized(G) for G in Gs], lambda As: torch._foreach_mul_(As, k))


def x_changed(*Gs: Tensor) -> list[Tensor]:
    Xs = [normalized(G) for G in Gs]
    return one(Xs, lambda As: torch._foreach_add_(Xs, list(Gs)))


def a_clamped(*Gs: Tensor) -> list[Tensor]:
    return one([normalized(G) for G in Gs], lambda As: torch._foreach_clamp_min_(As, -1.0))


def a_seen(*Gs: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    out = one([normalized(G) for G in Gs], lambda As: seen.extend(torch._foreach_norm(As)))
    return [*out, *seen]


def one_tensor_twice(*Gs: Tensor) -> list[Tensor]:
    """Written to twice by one operator."""
    X, (a, b, c) = normalized(Gs[0]), QUINTIC
    A = X @ X.mT
    B = A @ A
    torch._foreach_mul_([B, B], c**0.5)
    torch._foreach_add_([B], [A], alpha=b)
    return [a * X + B @ X]


def rows_that_read_one_another(*Gs: Tensor) -> list[Tensor]:
    X, (a, b, c) = normalized(Gs[0]), QUINTIC
    A = X @ X.mT
    B, C = c * A @ A, b * A
    torch._foreach_add_([B, C], [C, B])
    return [a * X + B @ X, C * 1]


def rows_swapped(*Gs: Tensor) -> list[Tensor]:
    """Each X is given the other's B X."""
    Xs, (a, b, c) = [normalized(G) for G in Gs], QUINTIC
    As = grams(Xs)
    Bs = torch._foreach_add(torch._foreach_mul(As, b), products(As, As), alpha=c)
    return list(torch._foreach_add(torch._foreach_mul(Xs, a), products(list(Bs), Xs)[::-1]))


def rows_of_a_written(*Gs: Tensor) -> list[Tensor]:
    Xs = [normalized(G) for G in Gs]
    return one(Xs, lambda As: torch._foreach_mul_([A[:2] for A in As], 2.0))


def transposes_of_a_written(*Gs: Tensor) -> list[Tensor]:
    """A^T is A, but that it is the same memory is not followed."""
    Xs = [normalized(G) for G in Gs]
    return one(Xs, lambda As: torch._foreach_mul_([A.mT for A in As], 2.0))


def weights_in_tensors(*Gs: Tensor) -> list[Tensor]:
    Xs, (a, b, c) = [normalized(G) for G in Gs], QUINTIC
    As = grams(Xs)
    weight = torch.full((), c / (b + c))
    Bs = torch._foreach_lerp(As, products(As, As), [weight] * len(Xs))
    return list(torch._foreach_add(torch._foreach_mul(Xs, a), products(list(Bs), Xs)))


def into_the_inputs(*Gs: Tensor) -> list[Tensor]:
    a, b, c = QUINTIC
    As = grams(list(Gs))
    Bs = torch._foreach_add(torch._foreach_mul(As, b), products(As, As), alpha=c)
    Ys = products(list(Bs), list(Gs))
    torch._foreach_mul_(list(Gs), a)
    torch._foreach_add_(list(Gs), Ys)
    return [Gs[0] * 1]


ELSE = "something else than X comes in"
TENSOR = "a coefficient is a tensor, and not a number of the graph"
# name, function, the reasons
LOOKALIKES: list[tuple[str, Body, list[str]]] = [
    ("entry by entry", entries, ["two matrices are multiplied entry by entry"]),
    ("a number added", a_number_added, ["a number is added to every entry"]),
    (
        "a tensor's coefficient",
        a_tensor_times,
        [TENSOR],
    ),
    ("X changed", x_changed, [ELSE]),
    ("clamped", a_clamped, ["_foreach_clamp_min_ inside the step"]),
    ("A seen", a_seen, ["A = X X^T of step 1 is also read by _foreach_norm"]),
    ("one tensor twice", one_tensor_twice, ["_foreach_mul_ inside the step"]),
    ("rows swapped", rows_swapped, [ELSE]),
    ("rows of A", rows_of_a_written, ["a matrix is broadcast or reshaped inside the step"]),
    ("A^T", transposes_of_a_written, [ELSE]),
    ("weights in tensors", weights_in_tensors, ["lerp inside the step"]),
    ("rows that read one another", rows_that_read_one_another, ["_foreach_add_ inside the step"]),
]


@pytest.mark.parametrize(("name", "body", "reasons"), LOOKALIKES, ids=[r[0] for r in LOOKALIKES])
def test_a_list_of_lookalikes_stays_as_it_was_written(
    name: str, body: Body, reasons: list[str]
) -> None:
    given = GIVEN[:2]
    rewritten = Rewritten(body, *given)
    assert (rewritten.calls, rewritten.reasons) == ([], reasons)
    assert rewritten.targets == rewritten.before
    for ours, theirs in zip(rewritten(*given), body(*given), strict=True):
        assert torch.equal(ours, theirs)


def test_a_list_that_the_cost_model_leaves_is_put_together_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch, "plain")
    for body in (new_lists, in_place):
        rewritten = Rewritten(body, *GIVEN)
        assert [r.action for r in rewritten.rows] == ["left", "left"]
        assert rewritten.targets == rewritten.before
        for ours, theirs in zip(rewritten(*GIVEN), body(*GIVEN), strict=True):
            assert torch.equal(ours, theirs)


def test_writes_to_lists_of_inputs_are_declined_and_kept() -> None:
    given = GIVEN[:2]
    rewritten = Rewritten(into_the_inputs, *given)
    assert rewritten.reasons == ["it writes into memory that others see"]
    assert rewritten.targets == rewritten.before
    eager, ours = ([g.clone() for g in given] for _ in range(2))
    into_the_inputs(*eager)
    rewritten(*ours)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # see test_newton_schulz


class OnLists(torch.optim.Optimizer):
    """Muon with all its sums on lists, of matrices of any sizes."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights = self.param_groups[0]["params"]
        gradients = [p.grad for p in weights]
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in weights]
        torch._foreach_lerp_(momenta, gradients, 0.1)
        Xs = torch._foreach_lerp(gradients, momenta, 0.9)
        torch._foreach_div_(Xs, torch._foreach_norm(Xs))
        a, b, c = QUINTIC
        for _ in range(3):
            As = grams(Xs)
            Bs = products(As, As)
            torch._foreach_mul_(Bs, c)
            torch._foreach_add_(Bs, As, alpha=b)
            Ys = products(Bs, Xs)
            torch._foreach_mul_(Xs, a)
            torch._foreach_add_(Xs, Ys)
        torch._foreach_mul_(weights, 0.99)
        torch._foreach_add_(weights, Xs, alpha=-0.1)


def test_a_compiled_step_on_lists_is_rewritten_and_computes_the_same() -> None:
    torch._dynamo.reset()
    eager, ours, optimizer = steps(lambda made: OnLists(made, {}), torch.float32, count=2)
    rows = moonfx.report(optimizer).iterations
    found = [(r.shape, r.count, r.calls, r.steps) for r in rows]
    assert sorted(found) == [((4, 6), 2, 1, 3), ((5, 5), 1, 1, 3), ((6, 4), 1, 1, 3)]
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # see test_newton_schulz


def test_lists_of_what_the_cost_model_leaves_are_as_they_were_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever else of the graph is rewritten, or written in the same lists."""

    def body(*Gs: Tensor) -> list[Tensor]:
        return [*in_place(*Gs[:2]), *in_place(*Gs[2:4])]

    def form(device: Any, dtype: Any, batch: int, m: int, *rest: Any) -> tuple[str, str]:
        return ("symmetric", "") if m == 4 else ("plain", "as written")

    monkeypatch.setattr(operator, "newton_schulz_form", form)
    given = [matrix(4, 6, seed=1), matrix(4, 6, seed=2), matrix(3, 5), matrix(3, 5, seed=3)]
    rewritten = Rewritten(body, *given)
    assert [(r.action, r.count) for r in rewritten.rows] == [("rewritten", 2), ("left", 2)]
    lists = [
        [str(t) for t in each if "_foreach" in str(t)]
        for each in (rewritten.before, rewritten.targets)
    ]
    assert lists[1] == lists[0][len(lists[0]) // 2 :]
    for a, b in zip(body(*given), rewritten(*given), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_lists_are_as_they_were_written_where_the_pass_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any) -> tuple[str, str]:
        raise ValueError("no form")

    monkeypatch.setattr(operator, "newton_schulz_form", fail)
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)
    rewritten = Rewritten(in_place, *GIVEN)
    assert (len(rewritten.failures), rewritten.rows) == (1, [])
    assert Counter(rewritten.targets) == Counter(rewritten.before)
    for a, b in zip(in_place(*GIVEN), rewritten(*GIVEN), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
