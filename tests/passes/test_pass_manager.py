"""Passes run in their order, those that are disabled do not, and the report says so."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from moonfx.passes.context import Context
from moonfx.passes.pass_manager import PASSES, Pass, run_passes
from moonfx.policy import LayerPolicy, Policies
from tests.support.newton_schulz.cases import always
from tests.support.tiny import TinyLM, tokens

NAMES = [name for name, _ in PASSES]
# Without these no attention is made sparse.
OF_ATTENTION = ["find_attention", "lay_out_heads", "classify_mask", "sparsify_attention"]
KNOWN = f"; known: {', '.join(NAMES)}"
UNKNOWN = [
    (["find_atention"], ValueError, "'find_atention' (did you mean 'find_attention'?)" + KNOWN),
    (["tvm"], ValueError, "disable_passes: no pass is named 'tvm'" + KNOWN),
    (["remove_dead", "verify"], ValueError, "disable_passes: no pass is named 'verify'" + KNOWN),
    ("remove_dead", TypeError, "disable_passes must be a list of names, got 'remove_dead' (str)"),
    ([1], TypeError, "disable_passes must be a list of names, got [1] (list)"),
    (None, TypeError, "disable_passes must be a list of names, got None (NoneType)"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (tokens(),), strict=False)


def verbs(model: nn.Module) -> list[Callable[..., object]]:
    """Each way to a model's passes; those of a model that is called are given no call."""
    program = exported(model)
    symbolic = fx.symbolic_trace(nn.Linear(2, 2))
    return [
        lambda **given: moonfx.sparsify(model, 16, 2, **given),
        lambda **given: moonfx.sparsify(symbolic, 16, 2, **given),
        lambda **given: moonfx.sparsify(program, 16, 2, **given),
        lambda **given: moonfx.explain(model, tokens(), block=16, topk=2, **given),
        lambda **given: moonfx.explain(program, block=16, topk=2, **given),
    ]


@pytest.mark.parametrize(("names", "error", "message"), UNKNOWN)
def test_a_name_that_no_pass_has_is_one_error_and_nothing_is_changed(
    names: object, error: type[Exception], message: str
) -> None:
    model = TinyLM()
    before = dict(vars(model))
    for verb in verbs(model):
        with pytest.raises(error, match=re.escape(message)):
            verb(disable_passes=names)
    assert vars(model) == before


@pytest.mark.parametrize("disabled", [[], ["find_attention"], ["remove_dead", "classify_mask"]])
def test_passes_run_in_their_order_without_those_that_are_disabled(disabled: list[str]) -> None:
    ran: list[str] = []

    def recorded(name: str) -> Pass:
        def run(graph: fx.Graph, context: Context) -> int:
            ran.append(name)
            return 0

        return run

    gm = fx.symbolic_trace(nn.Identity())
    context = Context(gm, lambda *site: LayerPolicy(), disabled=tuple(disabled))
    run_passes(context, tuple((name, recorded(name)) for name in NAMES), check=True)
    assert ran == [name for name in NAMES if name not in disabled]


@pytest.mark.parametrize("name", OF_ATTENTION)
def test_without_a_pass_for_attentions_the_model_runs_dense_and_says_which_pass_is_missing(
    name: str,
) -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, compiler="eager", disable_passes=[name])
    message = rf"no attention of TinyLM became sparse \(passes disabled: {name}\)"
    with pytest.warns(UserWarning, match=message):
        torch.testing.assert_close(model(x), dense)
    report = moonfx.report(model)
    assert report.footer().splitlines()[-1] == f"passes disabled: {name}"
    assert report.to_dict()["disabled"] == [name]
    found = [] if name == "find_attention" else [f"the pass {name} is disabled"] * 2
    assert [row.reason.split(" (node")[0] for row in report.rows] == found
    assert [row.action for row in report.rows] == ["declined"] * len(found)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_ATTENTION])
def test_without_another_pass_the_attentions_become_the_same(name: str) -> None:
    model, x = TinyLM(), tokens()
    expected = moonfx.sparsify(model, 16, 2, compiler="eager")(x)
    moonfx.sparsify(model, 16, 2, compiler="eager", disable_passes=(name, name))
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    report = moonfx.report(model)
    assert len(report.rewritten) == 2
    assert f"\npasses disabled: {name}" in report.footer()


def test_on_miss_raise_names_the_pass_and_leaves_the_model_as_it_was() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    options: dict[str, Any] = {"on_miss": "raise", "disable_passes": {"classify_mask"}}
    moonfx.sparsify(model, 16, 2, compiler="eager", **options)
    with pytest.raises(NothingRewritten, match=r"passes disabled: classify_mask\)"):
        model(x)
    assert torch.equal(model(x), dense)


def test_a_program_and_a_dry_run_disable_passes_as_a_model_does() -> None:
    model = TinyLM()
    program = exported(model)
    given: dict[str, Any] = {"disable_passes": ["sparsify_attention"]}
    with pytest.warns(UserWarning, match=r"\(passes disabled: sparsify_attention\)"):
        untouched = moonfx.sparsify(program, 16, 2, **given)
    reports = [
        moonfx.report(untouched),
        moonfx.explain(program, block=16, topk=2, **given),
        moonfx.explain(model, tokens(), block=16, topk=2, **given),
    ]
    for report in reports:
        assert [row.action for row in report.rows] == ["declined"] * 2
        assert report.disabled == ("sparsify_attention",)
    assert not any("moonfx" in str(n.target) for n in untouched.graph.nodes)


def newton_schulz(G: Tensor) -> Tensor:
    X = G / (G.norm() + 1e-7)
    for _ in range(3):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X


class Plain(torch.optim.Optimizer):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(newton_schulz(p.grad))


@pytest.mark.parametrize("disabled", [[], ["newton_schulz"]])
def test_newton_schulz_can_be_disabled_in_an_optimizers_step(
    disabled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    p = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = p.detach() - newton_schulz(p.grad)
    optimizer = Plain([p])
    options: dict[str, Any] = {"compiler": "eager", "disable_passes": disabled, "on_miss": "raise"}
    step = torch.compile(optimizer.step, backend="moonfx", options=options)
    if not disabled:
        step()
        assert [r.action for r in moonfx.report(optimizer).iterations] == ["rewritten"]
    else:
        message = r"the step of Plain compiled by backend 'moonfx' runs as it was \(passes disabled"
        with pytest.raises(Exception, match=message):
            step()
        options["on_miss"] = "ignore"
        torch.compile(optimizer.step, backend="moonfx", options=options)()
        assert moonfx.report(optimizer).iterations == []
        assert "passes disabled: newton_schulz" in moonfx.report(optimizer).footer()
    torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_disabled_is_part_of_the_policies_stamp_in_one_order() -> None:
    stamps = [
        str(Policies(LayerPolicy(), disable_passes=names))
        for names in ([], ["b", "a"], ("a", "b"), {"a"})
    ]
    assert stamps[1] == stamps[2]
    assert len(set(stamps)) == 3
