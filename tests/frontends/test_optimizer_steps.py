"""torch.compile(optimizer.step, backend="moonfx"): what reaches the passes, and what comes out."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from moonfx.backend.records import records_of
from moonfx.backend.rewriter import Backend
from tests.support.newton_schulz.cases import always, as_written

SHAPES = ((6, 4), (4, 6), (4, 6), (5, 5))
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def compiled(optimizer: torch.optim.Optimizer, **options: Any) -> Callable[[], Any]:
    given = {"compiler": "eager", "on_miss": "ignore", **options}
    step: Callable[[], Any] = torch.compile(optimizer.step, backend="moonfx", options=given)
    return step


def steps(
    make: Make, dtype: torch.dtype, count: int = 3, each: Callable[[Any], None] = lambda _: None
) -> tuple[list[Tensor], list[Tensor], torch.optim.Optimizer]:
    """Parameters and states after some steps, eager and compiled.

    Args:
        each: is called with the optimizer after each step.
    """
    outcomes = []
    for compile_it in (False, True):
        made = parameters(dtype)
        optimizer = make(made)
        step = compiled(optimizer) if compile_it else optimizer.step
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            for p in made:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            step()
            each(optimizer)
        states = [optimizer.state[p][k] for p in made for k in sorted(optimizer.state[p])]
        outcomes.append([*(p.detach() for p in made), *states])
    return outcomes[0], outcomes[1], optimizer


KINDS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "heavy ball"])
@pytest.mark.parametrize("dtype", KINDS, ids=["float32", "bfloat16"])
def test_a_compiled_muon_equals_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, nesterov: bool
) -> None:
    """What torch skips for Muon. Without Inductor nothing else differs: parameters and momentum,
    that of bfloat16 parameters too, which torch normalizes by mistake without nesterov.
    """
    as_written(monkeypatch)

    def make(made: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon(made, lr=0.01, nesterov=nesterov)

    eager, ours, optimizer = steps(make, dtype)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    rows = moonfx.report(optimizer).iterations
    assert [(r.shape, r.count, r.calls) for r in rows] == [((4, 6), 3, 2), ((5, 5), 1, 1)]


def test_a_schedule_of_a_tensor_lr_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    as_written(monkeypatch)
    graphs = []
    rewrite = Backend.rewrite

    def count(self: Any, *args: Any) -> Any:
        graphs.append(args)
        return rewrite(self, *args)

    monkeypatch.setattr(Backend, "rewrite", count)

    def make(made: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon(made, lr=torch.tensor(0.01))

    def schedule(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"].mul_(0.5)

    eager, ours, _ = steps(make, torch.float32, 4, schedule)
    assert len(graphs) == 1
    # Eager reads the rate as a number; a graph multiplies the bfloat16 update by it, and rounds.
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_a_learning_rate_that_becomes_a_symbol_stops_no_rewrite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dynamo makes one of a float that has changed."""
    always(monkeypatch)
    p = parameters()[0]
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.Muon([p], lr=0.02)
    step = compiled(optimizer)
    for _ in range(3):
        step()
        optimizer.param_groups[0]["lr"] *= 0.5
    report = moonfx.report(optimizer)
    assert (report.failures, {row.action for row in report.iterations}) == ([], {"rewritten"})
    assert report.graphs > 1


OTHERS: list[tuple[str, Make]] = [
    ("AdamW, foreach", lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True)),
    ("AdamW, tensor lr", lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01))),
    ("SGD", lambda p: torch.optim.SGD(p, lr=0.01)),
]


@pytest.mark.parametrize(("name", "make"), OTHERS, ids=[o[0] for o in OTHERS])
def test_other_optimizers_go_through_capture_as_they_were(name: str, make: Make) -> None:
    eager, ours, optimizer = steps(make, torch.float32, 2)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    report = moonfx.report(optimizer)
    assert (report.graphs, report.failures, report.iterations) == (1, [], [])


def test_an_optimizer_without_an_iteration_is_a_miss_that_says_so() -> None:
    made = parameters()
    for p in made:
        p.grad = torch.randn_like(p)
    with pytest.warns(UserWarning, match="by backend 'moonfx' holds no Newton-Schulz iteration"):
        compiled(torch.optim.SGD(made, lr=0.01), on_miss="warn")()


def muon() -> torch.optim.Optimizer:
    made = parameters()
    for p in made:
        p.grad = torch.randn_like(p)
    return torch.optim.Muon(made, lr=0.01)


def test_the_parameters_of_a_compiled_optimizer_are_freed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)
    optimizer = muon()
    compiled(optimizer)()
    alive = [weakref.ref(p) for p in optimizer.param_groups[0]["params"]]
    alive += [weakref.ref(s["momentum_buffer"]) for s in optimizer.state.values()]
    del optimizer
    gc.collect()
    assert [r() is not None for r in alive] == [False] * 8


def test_gradients_and_momenta_that_are_views_of_one_tensor_stay_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_written(monkeypatch)
    results = []
    for compile_it in (False, True):
        flat = torch.arange(48.0).sin().reshape(2, 4, 6)
        made = [nn.Parameter(x) for x in flat.clone()]
        gradients = flat.clone()
        for p, g in zip(made, gradients, strict=True):
            p.grad = g
        optimizer = torch.optim.Muon(made, lr=0.1)
        step = compiled(optimizer) if compile_it else optimizer.step
        step()
        results.append(torch.stack([p.detach() for p in made]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)
    (row,) = moonfx.report(optimizer).iterations
    assert (row.count, row.calls) == (2, 1)


def test_what_the_cost_model_leaves_is_no_miss_and_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch, "plain")
    optimizer = muon()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(optimizer, on_miss="raise")()
    report = moonfx.report(optimizer)
    assert [(r.action, r.calls) for r in report.iterations] == [("left", 0)] * 2
    assert report.iterations[0].reason == (
        "plain products, one after another, are what was written (asked for)"
    )
    assert "4 Newton-Schulz iterations in 1 graph(s): 0 rewritten" in str(report)


def test_iterations_that_are_all_declined_are_a_miss() -> None:
    class Cubic(torch.optim.SGD):
        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                X = p.grad / p.grad.norm()
                p.sub_(1.5 * X - 0.5 * (X @ X.T) @ X)

    made = parameters()
    for p in made:
        p.grad = torch.randn_like(p)
    with pytest.raises(
        Exception, match="of the step of Cubic .* is proved: a cubic step"
    ) as caught:
        compiled(Cubic(made), on_miss="raise")()
    assert isinstance(caught.value, NothingRewritten) or "NothingRewritten" in str(caught.value)


def test_reports_of_a_model_and_of_its_optimizer_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    model = nn.Linear(4, 6, bias=False)
    forward = torch.compile(
        model, backend="moonfx", options={"compiler": "eager", "on_miss": "ignore"}
    )
    forward(torch.randn(3, 4)).sum().backward()
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="step must be compiled .* that of this Muon is not"):
        moonfx.report(optimizer)
    compiled(optimizer)()
    assert (moonfx.report(model).graphs, moonfx.report(model).iterations) == (1, [])
    report = moonfx.report(optimizer)
    assert (report.graphs, len(report.iterations)) == (1, 1)
    assert report.to_dict()["iterations"][0]["action"] == "rewritten"
    assert moonfx.report().graphs >= 2


class ByData(torch.optim.SGD):
    """Writes to p.data, as Moonlight's does."""

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            X = p.grad / p.grad.norm()
            A = X @ X.mT if p.shape[0] <= p.shape[1] else X.mT @ X
            B = -1.5 * A + 0.5 * A @ A
            X = 2.0 * X + (B @ X if p.shape[0] <= p.shape[1] else X @ B)
            p.data.mul_(0.9)
            p.data.add_(X, alpha=-0.1)


def test_what_is_written_to_the_data_of_a_parameter_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)
    eager, ours, optimizer = steps(lambda made: ByData(made, lr=0.1), torch.float32, 2)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    report = moonfx.report(optimizer)
    assert (report.failures, {r.action for r in report.iterations}) == ([], {"rewritten"})


class Orthogonal(nn.Module):
    """A model whose forward iterates on its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            X = self.linear.weight / self.linear.weight.norm()
            A = X @ X.mT
            X = 2.0 * X + (-1.5 * A + 0.5 * A @ A) @ X
        y: Tensor = self.linear(x) @ X
        return y


def test_a_model_that_holds_an_iteration_is_no_optimizer() -> None:
    model = Orthogonal()
    options = {"compiler": "eager", "on_miss": "ignore"}
    torch.compile(model, backend="moonfx", options=options)(torch.randn(3, 6))
    report = moonfx.report(model)
    assert (report.graphs, len(report.iterations)) == (1, 1)
    assert len(records_of(model.parameters())) == 1
    with pytest.raises(ValueError, match="step must be compiled .* that of this Muon is not"):
        moonfx.report(torch.optim.Muon(model.parameters()))


def test_a_function_that_iterates_and_writes_to_its_parameter_is_an_optimizer_s_step() -> None:
    def step(p: Tensor, gradient: Tensor) -> None:
        X = gradient / gradient.norm()
        A = X @ X.mT
        p.sub_(2.0 * X + (-1.5 * A + 0.5 * A @ A) @ X)

    p = parameters()[0]
    options = {"compiler": "eager", "on_miss": "ignore"}
    with torch.no_grad():
        torch.compile(step, backend="moonfx", options=options)(p, torch.randn_like(p))
    assert len(moonfx.report(torch.optim.Muon([p])).iterations) == 1
    assert records_of([p]) == []


def test_writes_by_data_and_to_subclasses_stay_beside_an_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)

    def step(p: Tensor, gradient: Tensor, both: Tensor) -> None:
        p.data.mul_(0.9)
        X = gradient / gradient.norm()
        A = X @ X.mT
        p.sub_(2.0 * X + (-1.5 * A + 0.5 * A @ A) @ X)
        both.mul_(0.5)

    outcomes = []
    for compile_it in (False, True):
        _, a, p, _ = parameters()
        both = TwoTensor(a.detach(), p.detach().clone())
        options = {"compiler": "eager"}
        run = torch.compile(step, backend="moonfx", options=options) if compile_it else step
        with torch.no_grad():
            run(p, a.detach().flip(0), both)
        outcomes.append([p.detach(), both.a, both.b])
    for eager, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)


class ByDataWithLoss(torch.optim.SGD):
    """Returns a loss of parameters that it then writes to by their data."""

    def step(self) -> Tensor:  # type: ignore[override]
        loss = torch.zeros(())
        for p in self.param_groups[0]["params"]:
            with torch.enable_grad():
                loss = loss + p.square().sum()
            with torch.no_grad():
                X = p.data / p.data.norm()
                A = X @ X.mT
                p.data.add_(2.0 * X + (-1.5 * A + 0.5 * A @ A) @ X, alpha=-0.1)
        return loss


def test_the_loss_that_a_step_returns_still_has_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)
    outcomes = []
    for compile_it in (False, True):
        (p,) = made = parameters()[1:2]
        optimizer = ByDataWithLoss(made, lr=0.1)
        step = compiled(optimizer) if compile_it else optimizer.step
        step().backward()
        outcomes.append((p.detach(), p.grad))
    for eager, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_under_inductor_too_a_compiled_muon_is_as_near_to_eager_as_bfloat16_allows() -> None:
    """Inductor keeps the normalized momentum in float32 where eager rounds it to bfloat16, and the
    operator sums in another order: an entry of the update, at most about 1.2, moves by some
    percent, as two roundings of one iteration do (1.5 % of the norm of a Gaussian matrix's)."""

    def make(made: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon(made, lr=0.01, adjust_lr_fn="original")

    results = []
    for compile_it in (False, True):
        generator = torch.Generator().manual_seed(0)
        made = [nn.Parameter(torch.randn(32, 64, generator=generator)) for _ in range(2)]
        optimizer = make(made)
        step = torch.compile(optimizer.step, backend="moonfx") if compile_it else optimizer.step
        for _ in range(3):
            for p in made:
                p.grad = torch.randn(p.shape, generator=generator)
            step()
        results.append(torch.stack([p.detach() for p in made]))
    moved = (results[0] - results[1]).norm() / (0.01 * 3 * (2 * 32) ** 0.5)
    assert moved < 0.04  # of the norm of three updates
