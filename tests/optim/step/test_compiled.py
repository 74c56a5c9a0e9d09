"""The step under a compiler, ours and the user's, and under a mode that forbids host waits."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from moonfx.optim.muon import Muon
from moonfx.optim.step import compiled
from moonfx.optim.step import update as step
from tests.support.no_waits import NoWaits
from tests.support.optim.by_hand import Row, muon

# Between eager and compiled, relative to the root mean square of an update. A compiler fuses, so
# that the last bits of float32 differ; those decide here and there between two neighbours in
# bfloat16, 2^-8 apart, and Newton-Schulz enlarges small singular values, each step 3.4 times.
COMPILED = 0.15
# With Newton-Schulz in float64 instead there is only float32's own rounding of weights of 1.
EXACT = 1e-4

SHAPES = [(16, 24), (16, 24), (24, 16), (16,), (2, 8, 8), (24, 8), (8, 2, 8), (8, 4, 3)]
ROWS = [
    *(Row("0"), Row("1"), Row("2"), Row("3", "adamw"), Row("4", layout=Layout("batch"))),
    Row("5", layout=Layout(outer=2, sizes=(4, 4, 4))),
    *(Row("6", layout=Layout("middle")), Row("7", layout=Layout("flatten", outer=2))),
]


def made(how: dict[str, Any], rows: list[Any] = ROWS, lr: float | Tensor = 0.1) -> Muon:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(SHAPES[int(row.name)])) for row in rows]
    half = len(parameters) // 2
    groups = [{"params": parameters[:half]}, {"params": parameters[half:], "weight_decay": 0.0}]
    settings = {"lr": lr, "weight_decay": 0.3, "maximize": how.pop("maximize", False)}
    # torch's AdamW has no capturable form on a CPU, and Muon's has.
    capturable = isinstance(lr, Tensor) and all(row.optimizer == "muon" for row in rows)
    return muon(torch.optim.AdamW(groups, **settings, capturable=capturable), *rows, **how)


def run(optimizer: Muon, call: Any, steps: int = 3) -> list[Tensor]:
    """The weights after steps at a falling learning rate."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for i in range(steps):
        torch.manual_seed(100 + i)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step() if call is None else call()
        schedule.step()
    return [p.detach() for p in parameters]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    change = 0.1 * 0.2  # the first lr times the root mean square
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / change


HOW: list[dict[str, Any]] = [
    {},
    dict(decay="cautious", nesterov=False, exact_rms=True, maximize=True),
    dict(decay="coupled"),
]


@pytest.fixture
def graphs(monkeypatch) -> list[Any]:
    """Compiles by AOTAutograd alone, which is quick; the list counts the graphs."""
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    fast = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(compiled, "compile_step", fast)
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize("how", HOW, ids=lambda x: ", ".join(map(str, x.values())) or "default")
def test_a_schedule_runs_on_one_graph_per_bucket_and_does_what_the_eager_step_does(
    how, graphs, monkeypatch
) -> None:
    monkeypatch.setattr(step, "COMPUTE", torch.float64)
    expected = run(made({**how, "compile": False}), None)
    found = run(made({**how, "compile": True}), None)
    assert len(graphs) == 1
    assert largest_difference(found, expected) < EXACT


def test_the_schedules_of_decay_and_momentum_compile_nothing_again(graphs) -> None:
    optimizer = made(dict(compile=True), ROWS[:2])
    for value in (0.1, 0.2, 0.3):
        optimizer.param_groups[0].update(weight_decay=value, momentum=0.8 + value / 2)
        optimizer.param_groups[1].update(momentum=0.8 + value / 2)
        run(optimizer, None, 1)
    assert len(graphs) == 1


def test_weights_of_two_dtypes_are_two_graphs_and_a_missing_gradient_a_third(graphs) -> None:
    parameters = [nn.Parameter(torch.randn(8, 8).to(t)) for t in (torch.float32, torch.bfloat16)]
    parameters.append(nn.Parameter(torch.randn(8, 8)))
    optimizer = muon(torch.optim.AdamW(parameters), compile=True)
    run(optimizer, None, 2)
    assert len(graphs) == 2
    optimizer.zero_grad()
    parameters[0].grad = torch.randn(8, 8)
    optimizer.step()
    optimizer.step()
    assert len(graphs) == 3


@pytest.mark.slow
@pytest.mark.sweep
def test_inductor_steps_as_eager_does_on_one_graph() -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rows = [ROWS[2], ROWS[3]]  # a matrix, and a vector of AdamW's
    found = run(made(dict(compile=True), rows), None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert largest_difference(found, run(made(dict(compile=False), rows), None)) < COMPILED


def test_the_choice_says_why() -> None:
    optimizer = made({})
    assert optimizer.plan() == "nothing to step: no Muon parameter has a gradient"
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    assert "7 parameters, 1,696 numbers, torch.float32 on cpu: eager, because" in optimizer.plan()
    optimizer = made(dict(compile=True), ROWS[:1])
    optimizer.param_groups[1]["params"][0].grad = torch.zeros(16, 24)
    assert "one compiled graph, because compile=True was asked for" in optimizer.plan()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # it sees no compiled step
@pytest.mark.parametrize(("rows", "fullgraph"), [(ROWS[2:3], True), (ROWS[2:4], False)])
def test_the_users_own_compilation_of_step_does_what_eager_does(rows, fullgraph) -> None:
    """AdamW's part breaks the graph: torch traces its optimizers only where the user made them."""
    torch._dynamo.reset()
    lr = torch.tensor(0.1)
    expected = run(made({}, rows, lr.clone()), None)
    optimizer = made({}, rows, lr.clone())
    call = torch.compile(optimizer.step, backend="aot_eager", fullgraph=fullgraph)
    assert largest_difference(run(optimizer, call), expected) < COMPILED


@pytest.mark.parametrize("how", HOW, ids=lambda x: ", ".join(map(str, x.values())) or "default")
def test_the_host_waits_for_nothing_with_a_tensor_lr(how) -> None:
    optimizer = made(dict(how), [ROWS[i] for i in (0, 1, 2, 4, 5)], torch.tensor(0.1))
    run(optimizer, None, 1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert optimizer.state[p]["step"].device == p.device
    with NoWaits():
        optimizer.step()
