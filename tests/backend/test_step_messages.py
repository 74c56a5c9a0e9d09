"""What a user is told of a compiled optimizer's step: by warnings, and by the report."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import moonfx
from moonfx.backend import rewriter
from moonfx.backend.records import records_of
from moonfx.capture.retrace import CaptureError
from moonfx.passes import pass_manager
from moonfx.passes.attention import find_attention
from tests.support.newton_schulz.cases import always

Parameters = list[nn.Parameter]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    always(monkeypatch)
    yield
    torch._dynamo.reset()


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 6), (6, 8))]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def compiled(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    given = {"compiler": "eager", "on_miss": "ignore", **options}
    made: Callable[..., Any] = torch.compile(call, backend="moonfx", options=given)
    return made


def iterate(G: Tensor, steps: int = 2) -> Tensor:
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def note(_: str) -> None:
    """What Dynamo cannot trace."""


note = torch.compiler.disable(note)


class Plain(torch.optim.Optimizer):
    """An optimizer whose step is one of the functions below."""

    def __init__(self, made: Parameters, run: Callable[[Parameters], None]) -> None:
        super().__init__(made, {"lr": 0.1})
        self.run = run

    def step(self) -> None:  # type: ignore[override]
        self.run(self.param_groups[0]["params"])


def descend(made: Parameters) -> None:
    for p in made:
        p.data.sub_(p.grad)


def cubic(made: Parameters) -> None:
    for p in made:
        X = p.grad / p.grad.norm()
        p.data.sub_(1.5 * X - 0.5 * (X @ X.T) @ X)


class InPieces(torch.optim.Optimizer):
    """A step with a graph break. Dynamo would leave it out whole if it named nothing of torch."""

    def __init__(self, made: Parameters, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__(made, {"lr": 0.1})
        self.last = last

    def step(self) -> None:  # type: ignore[override]
        made = self.param_groups[0]["params"]
        for p in made:
            p.data.mul_(0.9)
        note("a graph break")
        with torch.no_grad():
            for p in made:
                p.sub_(self.last(p.grad))


class InALoop(InPieces):
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            note("a graph break")
            p.data.sub_(self.last(p.grad))


MISSES: list[tuple[str, Callable[[Parameters], torch.optim.Optimizer], str]] = [
    (
        "no iteration",
        lambda p: Plain(p, descend),
        "the step of Plain compiled by backend 'moonfx' holds no Newton-Schulz iteration, and of "
        "an optimizer nothing else is made faster: .*set on_miss='ignore'",
    ),
    (
        "declined",
        lambda p: Plain(p, cubic),
        r"no Newton-Schulz iteration of the step of Plain .* is proved: a cubic step: the "
        r"operator's has A\^2 \(test_step_messages.py:\d+\)",
    ),
    (
        "in pieces",
        lambda p: InPieces(p, torch.clone),
        "the step of InPieces .* came in pieces, and none holds a Newton-Schulz iteration; it was "
        r"broken at test_step_messages.py:\d+: .*: mend the breaks",
    ),
    (
        "a helper for each size",
        lambda p: InALoop(p, iterate),
        "is proved: sizes are not known when the graph is compiled .*dynamic=False",
    ),
]


@pytest.mark.parametrize(("name", "make", "message"), MISSES, ids=[m[0] for m in MISSES])
def test_a_miss_says_what_was_seen_and_what_to_do(
    name: str, make: Callable[[Parameters], torch.optim.Optimizer], message: str
) -> None:
    optimizer = make(parameters())
    with pytest.warns(UserWarning, match=message):
        compiled(optimizer.step, on_miss="warn")()


def test_an_iteration_after_a_graph_break_is_no_miss_and_is_in_the_report() -> None:
    optimizer = InPieces(parameters(), iterate)
    compiled(optimizer.step, on_miss="raise")()
    report = moonfx.report(optimizer)
    assert [(r.shape, r.count, r.action) for r in report.iterations] == [
        ((4, 6), 1, "rewritten"),
        ((6, 8), 1, "rewritten"),
    ]
    assert "2 Newton-Schulz iterations in 2 graph(s): 2 rewritten" in str(report)


def test_a_helper_of_a_broken_step_without_an_iteration_is_no_miss() -> None:
    optimizer = InALoop(parameters(), lambda g: torch.sin(g) * 2)
    compiled(optimizer.step, on_miss="raise")()
    assert (moonfx.report(optimizer).graphs, moonfx.report(optimizer).iterations) == (2, [])


def test_what_a_step_in_a_loop_of_graph_breaks_calls_is_in_its_report() -> None:
    """Dynamo compiles the function that the step calls, which holds no parameter."""
    optimizer = InALoop(parameters(), iterate)
    torch.compile(optimizer.step, backend="moonfx", dynamic=False, options={"compiler": "eager"})()
    report = moonfx.report(optimizer)
    assert [(r.shape, r.count, r.action) for r in report.iterations] == [
        ((4, 6), 1, "rewritten"),
        ((6, 8), 1, "rewritten"),
    ]
    assert "2 Newton-Schulz iterations in 1 graph(s), compiled 2 times" in str(report)
    other = torch.optim.Muon(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="that of this Muon is not"):
        moonfx.report(other)


def test_a_step_that_dynamo_left_out_is_told_why() -> None:
    optimizer = InALoop(parameters(), torch.compiler.disable(iterate))
    compiled(optimizer.step)()
    with pytest.raises(ValueError, match="if it was, Dynamo left it out.*graph breaks so far"):
        moonfx.report(optimizer)


@pytest.fixture
def one_process() -> Iterator[None]:
    group = {"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}
    torch.distributed.init_process_group("gloo", **group)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
def test_parameters_spread_over_devices_are_named(one_process: None, placement: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [placement]))
    p.grad = distribute_tensor(torch.randn(4, 6), mesh, [placement])
    optimizer = torch.optim.Muon([p], lr=0.1)
    message = rf"its parameters are .*\(DTensor, {str(placement)[0]}.*full_tensor\(\)"
    with pytest.warns(UserWarning, match=message):
        compiled(optimizer.step, on_miss="warn")()


def test_iterations_on_the_whole_matrices_of_replicated_parameters_are_found(
    one_process: None,
) -> None:
    mesh = init_device_mesh("cpu", (1,))
    made = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])) for p in parameters()]
    for p in made:
        p.grad = distribute_tensor(torch.randn(p.shape), mesh, [Replicate()])

    def local(given: Parameters) -> None:
        for p in given:
            p.data.to_local().sub_(iterate(p.grad.to_local()))

    optimizer = Plain(made, local)
    expected = [p.detach().to_local() - iterate(p.grad.to_local()) for p in made]
    compiled(optimizer.step, on_miss="raise")()
    assert [r.action for r in moonfx.report(optimizer).iterations] == ["rewritten"] * 2
    for p, each in zip(made, expected, strict=True):  # sums in another order
        torch.testing.assert_close(p.detach().to_local(), each, atol=1e-5, rtol=0)


class Orthogonal(nn.Module):
    """A model that iterates on its own weight, and writes to it, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(iterate(self.weight))
        return x @ self.weight


def test_a_model_that_iterates_and_writes_to_its_own_weight_is_no_optimizer() -> None:
    model = Orthogonal()
    compiled(model)(torch.randn(3, 4))
    report = moonfx.report(model)
    assert (report.graphs, [r.action for r in report.iterations]) == (1, ["rewritten"])
    assert len(records_of(model.parameters())) == 1
    with pytest.raises(ValueError, match="that of this Muon is not"):
        moonfx.report(torch.optim.Muon(model.parameters()))


def test_a_compiled_model_that_a_step_calls_in_its_closure_is_no_optimizer() -> None:
    model = nn.Linear(4, 6, bias=False)
    forward = compiled(model)
    loss = compiled(lambda x: (x @ model.weight.T).square().mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = forward(torch.ones(2, 4)).square().mean() + loss(torch.ones(2, 4))
        value.backward()
        return value

    optimizer.step(closure)
    assert (moonfx.report(model).graphs, len(records_of(model.parameters()))) == (2, 2)
    with pytest.raises(ValueError, match="that of this SGD is not"):
        moonfx.report(optimizer)


def test_a_model_that_writes_to_the_data_of_its_weight_is_captured() -> None:
    """The write stays hidden from autograd, as it was: backward needs the weight that it saved."""

    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            self.weight.data.mul_(0.5)
            return y

    found = []
    for given in (Decayed(), compiled(Decayed())):
        x = torch.ones(3, 4, requires_grad=True)
        y = given(x)
        y.sum().backward()
        found += [(y.detach(), x.grad)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
    assert moonfx.report(given).failures == []


def test_a_step_that_cannot_be_captured_says_that_it_runs_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise CaptureError("injected")

    monkeypatch.setattr(rewriter, "capture", fail)
    optimizer = Plain(parameters(), descend)
    with pytest.warns(UserWarning, match="the step of Plain .* runs as it was\n(.|\n)*injected"):
        compiled(optimizer.step, on_miss="warn")()
    assert moonfx.report(optimizer).footer().splitlines() == [
        "0 Newton-Schulz iterations in 1 graph(s): 0 rewritten to 0 calls, 0 left as written, 0 "
        "declined",
        "not captured, runs as it was: injected",
    ]


def test_a_failing_pass_for_attentions_leaves_the_iterations_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And says so; that a failing newton_schulz leaves the attentions is in
    tests/passes/newton_schulz/test_operator_call.py."""
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)

    def fail(*_: object) -> int:
        raise KeyError("injected")

    named = tuple(
        (name, fail if name == "find_attention" else run)
        for name, run in pass_manager.run_passes.__defaults__[0]
    )
    monkeypatch.setattr(pass_manager.run_passes, "__defaults__", (named,))
    assert find_attention.run is not fail
    optimizer = Plain(parameters(), lambda made: [p.data.sub_(iterate(p.grad)) for p in made])
    compiled(optimizer.step)()
    report = moonfx.report(optimizer)
    assert [r.action for r in report.iterations] == ["rewritten"] * 2
    assert report.failures == ["a pass failed, attentions stay: KeyError: 'injected'"]


def test_a_failing_newton_schulz_is_named_in_the_footer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)

    def fail(*_: object) -> None:
        raise AttributeError("injected")

    monkeypatch.setattr("moonfx.passes.newton_schulz.rewrite.find_steps", fail)
    optimizer = Plain(parameters(), lambda made: [p.data.sub_(iterate(p.grad)) for p in made])
    compiled(optimizer.step)()
    assert moonfx.report(optimizer).footer().splitlines()[-1] == (
        "a pass failed, what the others did stays: newton_schulz: AttributeError: injected"
    )
