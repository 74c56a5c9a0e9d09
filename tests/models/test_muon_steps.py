"""Whole steps of everyone's Muon under torch.compile(step, backend="moonfx").

What is found in each, exactly; that three steps compute what they did; how often they compile.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moonfx
from moonfx.backend.rewriter import Backend
from tests.support import muon_steps as written
from tests.support.newton_schulz.cases import always, as_written

Make = Callable[..., torch.optim.Optimizer]
Rows = list[tuple[tuple[int, ...], int, int]]

SHAPES = ((6, 4), (4, 6), (4, 6), (5, 5), (5, 5))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each graph that is compiled."""
    found: list[None] = []
    rewrite = Backend.rewrite

    def count(self: Any, *args: Any) -> Any:
        found.append(None)
        return rewrite(self, *args)

    monkeypatch.setattr(Backend, "rewrite", count)
    return found


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def three_steps(make: Make, lr: Any, compile_it: bool) -> tuple[list[Tensor], Any]:
    """Parameters and states after three steps, the learning rate halved after each."""
    made = parameters()
    optimizer = make(made, lr=lr.clone() if isinstance(lr, Tensor) else lr)
    options = {"compiler": "eager", "on_miss": "raise"}
    step = optimizer.step
    step = torch.compile(step, backend="moonfx", options=options) if compile_it else step
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator)
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    states = [optimizer.state[p][k] for p in made for k in sorted(optimizer.state[p])]
    return [*(p.detach() for p in made), *(x for x in states if isinstance(x, Tensor))], optimizer


EACH: Rows = [((4, 6), 3, 1), ((5, 5), 2, 1)]
# Name, optimizer, iterations found (size, how many, calls), graphs compiled: the first step makes
# the states and is another graph than those after it; a count of steps in a number is one more.
CASES: list[tuple[str, Make, Rows, int]] = [
    ("with Adam", written.WithAdam, [((4, 6), 3, 2), ((5, 5), 1, 1)], 3),
    ("by data", written.ByData, [((4, 6), 3, 2), ((5, 5), 2, 1)], 2),
    ("megabatch", written.Megabatch, [((1, 4, 6), 1, 1), ((2, 4, 6), 1, 1), ((2, 5, 5), 1, 1)], 2),
    ("into buffers", written.IntoBuffers, EACH, 2),
    ("foreach", written.Foreach, [((3, 4, 6), 1, 1), ((2, 5, 5), 1, 1)], 2),
    ("own", written.Own, [((6, 4), 1, 1), ((4, 6), 2, 1), ((5, 5), 2, 1)], 2),
]


@pytest.mark.parametrize(("name", "make", "rows", "count"), CASES, ids=[c[0] for c in CASES])
def test_everyone_s_step_is_found_whole_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[None],
    name: str,
    make: Make,
    rows: Rows,
    count: int,
) -> None:
    as_written(monkeypatch)
    with torch.compiler.set_stance("force_eager"):  # what has a torch.compile of its own, too
        eager, _ = three_steps(make, 0.02, compile_it=False)
    ours, optimizer = three_steps(make, 0.02, compile_it=True)
    report = moonfx.report(optimizer)
    assert report.failures == []
    assert [(r.shape, r.count, r.calls) for r in report.iterations] == rows
    assert {r.action for r in report.iterations} == {"rewritten"}
    assert len(graphs) == count
    for a, b in zip(eager, ours, strict=True):  # (c A) A in float32 is c (A A), but for rounding
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def six_steps(optimizer: torch.optim.Optimizer, compile_it: bool) -> list[Tensor]:
    """The parameters after six steps on one schedule."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    options = {"compiler": "eager"}
    step: Any = optimizer.step
    step = torch.compile(step, backend="moonfx", options=options) if compile_it else step
    made = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator)
        step()
        schedule.step()
    return [p.detach() for p in made]


class OnlyMuon(written.WithAdam):
    """Without the group for Adam, whose count of steps is a number."""

    def __init__(self, made: list[nn.Parameter], lr: Any, with_states: bool) -> None:
        super().__init__([*made, made[0].new_zeros(1).requires_grad_()], lr=lr)  # type: ignore[list-item]
        del self.param_groups[1]
        for p in made if with_states else []:
            self.state[p]["buffer"] = torch.zeros_like(p)


# A number that changes becomes a symbol in the second graph; states are made in the first.
SCHEDULES: list[Any] = [
    pytest.param("a number", 0.02, False, 2),
    pytest.param("a number, states made before", 0.02, True, 2, marks=pytest.mark.sweep),
    pytest.param("a tensor", torch.tensor(0.02), False, 2, marks=pytest.mark.sweep),
    pytest.param("a tensor, states made before", torch.tensor(0.02), True, 1),
]


@pytest.mark.parametrize(("name", "lr", "with_states", "count"), SCHEDULES)
def test_a_scheduler_over_six_steps_costs_few_graphs(
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[None],
    name: str,
    lr: Any,
    with_states: bool,
    count: int,
) -> None:
    always(monkeypatch)
    results = []
    for compile_it in (False, True):
        given = lr.clone() if isinstance(lr, Tensor) else lr
        optimizer = OnlyMuon(parameters(((4, 6), (4, 6))), given, with_states)
        results.append(six_steps(optimizer, compile_it))
    for a, b in zip(*results, strict=True):  # symmetric products: sums in another order
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert len(graphs) == count
    report = moonfx.report(optimizer)
    assert [(r.count, r.calls) for r in report.iterations] == [(2, 1)]
    times = f", compiled {count} times" if count > 1 else ""
    assert f"2 Newton-Schulz iterations in 1 graph(s){times}: 2 rewritten" in str(report)


def test_a_float_lr_that_changes_costs_no_graph_each_where_autograd_traces_too(
    monkeypatch: pytest.MonkeyPatch, graphs: list[None]
) -> None:
    """AOTAutograd, and so Inductor, makes a constant of a symbol in alpha, and a guard on it."""
    always(monkeypatch)
    results = []
    for compile_it in (False, True):
        (p,) = parameters(((4, 6),))
        optimizer = OnlyMuon([p], 0.02, True)
        options = {"compiler": "aot_eager"}
        step: Any = optimizer.step
        step = torch.compile(step, backend="moonfx", options=options) if compile_it else step
        for _ in range(4):
            p.grad = torch.ones_like(p)
            step()
            optimizer.param_groups[0]["lr"] *= 0.5
        results.append(p.detach())
    assert len(graphs) == 2
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [written.ByData, written.Own], ids=["by data", "own"])
def test_a_step_with_a_closure_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    """The closure's backward is no part of the graph; what follows it is."""
    always(monkeypatch)
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
        made = list(model.parameters())
        own = {"run": written.iterate} if make is written.ByData else {}
        optimizer = make(made, lr=0.02, **own)
        options = {"compiler": "eager", "on_miss": "ignore"}
        step: Any = optimizer.step
        step = torch.compile(step, backend="moonfx", options=options) if compile_it else step

        def closure(model: nn.Module = model, of: Any = optimizer) -> Tensor:
            of.zero_grad()
            loss: Tensor = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            return loss

        losses = [step(closure).detach() for _ in range(2)]
        results.append([*losses, *(p.detach() for p in made)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    rows = moonfx.report(optimizer).iterations
    assert (sum(r.count for r in rows), {r.action for r in rows}) == (2, {"rewritten"})
