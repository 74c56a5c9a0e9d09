"""Attention is found and right whatever is built around it, or the report says that it is not seen.

Each row: what is around the attentions, the model, what the report must say of each of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from tests.support.agreement import (
    BLOCK,
    FEW,
    ROUNDING,
    Tolerance,
    outputs,
    sparsified,
)
from tests.support.surroundings import SPARSE, X, forward, outcome
from tests.support.tiny import TinyLM

# bfloat16 has 8 bits: two roundings of values of order one differ by 2 ** -7.
HALF = Tolerance(output=4e-2, gradient=2e-2, relative=2e-2)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONFX_VERIFY", "1")


# --- around each layer ----------------------------------------------------------------------------


class Around(TinyLM):
    """Runs each layer by `around(layer, x)`."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor], layers: int = 2) -> None:
        super().__init__(layers)
        self.around = around

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + self.around(layer, x)
        return self.head(x)


def in_context(make: Callable[[], Any], layer: nn.Module, x: Tensor) -> Tensor:
    with make():
        return layer(x)


def in_inference_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = layer(x)
    return y.clone()


def by_set_grad_enabled(layer: nn.Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    y = layer(x)
    torch.set_grad_enabled(True)
    return y


def then_break(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    torch._dynamo.graph_break()
    return y


def then_print(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    print(float(y.sum()))  # noqa: T201
    return y


def by_its_values(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x.sum() > -1e9 else layer(-x)


def with_other_weights(layer: nn.Module, x: Tensor) -> Tensor:
    doubled = {name: p * 2 for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, doubled, (x,))


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x))


BOTH = [("layers.0", SPARSE), ("layers.1", SPARSE)]
TWICE = [("layers.0", SPARSE)] * 2 + [("layers.1", SPARSE)] * 2
# After a graph break one graph serves every layer, and counts once, by the first one's name.
ONE_GRAPH = [("layers.0", SPARSE)]

bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)

AROUND = [
    # name, around, report, tolerance
    ("checkpoint", partial(checkpoint, use_reentrant=False), BOTH, ROUNDING),
    ("reentrant checkpoint", partial(checkpoint, use_reentrant=True), BOTH, ROUNDING),
    ("no_grad", partial(in_context, torch.no_grad), BOTH, ROUNDING),
    ("set_grad_enabled", by_set_grad_enabled, BOTH, ROUNDING),
    ("inference_mode", in_inference_mode, BOTH, ROUNDING),
    ("autocast", partial(in_context, bfloat16), BOTH, HALF),
    ("autocast off", partial(in_context, partial(bfloat16, enabled=False)), BOTH, ROUNDING),
    ("graph break", then_break, ONE_GRAPH, ROUNDING),
    ("print", then_print, ONE_GRAPH, ROUNDING),
    ("branch on values", by_its_values, ONE_GRAPH, ROUNDING),
    ("functional_call", with_other_weights, BOTH, ROUNDING),
    ("shared layers", twice, TWICE, ROUNDING),
]


@pytest.mark.parametrize(
    ("around", "expected", "tolerance"), [r[1:] for r in AROUND], ids=[r[0] for r in AROUND]
)
def test_attention_is_found_and_right_whatever_runs_its_layer(around, expected, tolerance) -> None:
    report = sparsified(Around(around), forward, tolerance)
    assert outcome(report) == expected
    assert report.failures == []


WHOLE = [
    # name, what the call is in, tolerance
    ("no_grad", torch.no_grad, ROUNDING),
    ("inference_mode", torch.inference_mode, ROUNDING),
    ("set_grad_enabled", partial(torch.set_grad_enabled, False), ROUNDING),
    ("autocast", bfloat16, HALF),
]


@pytest.mark.parametrize(("make", "tolerance"), [r[1:] for r in WHOLE], ids=[r[0] for r in WHOLE])
def test_attention_is_found_and_right_whatever_the_call_is_in(make, tolerance) -> None:
    def call(model: nn.Module) -> Any:
        with make():
            return [t.clone() for t in outputs(model(X))]

    assert outcome(sparsified(TinyLM(), call, tolerance)) == BOTH


# --- hooks on what autograd saves, around the first call ------------------------------------------


def counted(model: nn.Module, saved: list[type]) -> Tensor:
    def pack(tensor: Tensor) -> Tensor:
        saved.append(type(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return model(X)


def checkpointed_twice(model: nn.Module) -> Tensor:
    return checkpoint(partial(checkpoint, model, use_reentrant=False), X, use_reentrant=False)


def after_no_grad(model: nn.Module) -> Tensor:
    with torch.no_grad():
        model(X)
    return checkpoint(model, X, use_reentrant=False)


def kept_on_cpu(model: nn.Module) -> Tensor:
    with save_on_cpu():
        return model(X)


def selectively(model: nn.Module) -> Tensor:
    def recompute(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, recompute)
    return checkpoint(model, X, use_reentrant=False, context_fn=contexts)


HOOKED = [
    ("checkpoint", partial(checkpoint, tokens=X, use_reentrant=False)),
    ("reentrant checkpoint", lambda model: checkpoint(model, X, use_reentrant=True)),
    ("checkpoint in checkpoint", checkpointed_twice),
    ("selective checkpoint", selectively),
    ("checkpoint after no_grad", after_no_grad),
    ("save_on_cpu", kept_on_cpu),
]


@pytest.mark.parametrize("call", [r[1] for r in HOOKED], ids=[r[0] for r in HOOKED])
# TinyLM's input is tokens, which no reentrant checkpoint can see gradients through.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_the_first_call_may_be_under_hooks_on_saved_tensors(call) -> None:
    assert outcome(sparsified(TinyLM(), call)) == BOTH


def test_hooks_on_saved_tensors_see_only_what_the_run_saves() -> None:
    model, first, second = TinyLM(), list[type](), list[type]()
    moonfx.sparsify(model, BLOCK, FEW, compiler="eager")
    counted(model, first)
    counted(model, second)
    assert first == second


# --- modules and compilations inside modules ------------------------------------------------------


class Tied(TinyLM):
    """The head is the embedding, and the layers share one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.layers[1].out = self.layers[0].out


class OneLayerThreeTimes(TinyLM):
    def __init__(self) -> None:
        super().__init__(layers=1)
        self.layers = nn.ModuleList([self.layers[0]] * 3)


class CompiledInside(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = torch.compile(self.layers[0], backend="eager")
        self.layers[1].compile(backend="eager")


class Whole(nn.Module):
    """A model of which another makes one pass with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyLM()

    def forward(self, tokens: Tensor) -> Tensor:
        weights = {name: p * 1.5 for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, weights, (tokens,))


def called_functionally(model: nn.Module) -> Any:
    return torch.func.functional_call(model, dict(model.named_parameters()), (X,))


INNER = [(f"inner.{layer}", action) for layer, action in BOTH]
MODULES = [
    # name, model, call, report
    ("tied weights", Tied, forward, BOTH),
    ("one layer three times", OneLayerThreeTimes, forward, [("layers.0", SPARSE)] * 3),
    ("compiled layers", CompiledInside, forward, [("layers.0._orig_mod", SPARSE), BOTH[1]]),
    ("functional_call within", Whole, forward, INNER),
    ("functional_call without", TinyLM, called_functionally, BOTH),
]


@pytest.mark.parametrize(
    ("make", "call", "expected"), [r[1:] for r in MODULES], ids=[r[0] for r in MODULES]
)
def test_attention_is_found_and_right_however_modules_share_and_nest(make, call, expected) -> None:
    # Weights on both sides of the model, or grown by half, make values of order ten.
    report = sparsified(make(), call, Tolerance(output=5e-5, gradient=5e-5))
    assert outcome(report) == expected
    assert report.failures == []


# --- what moonfx cannot see -----------------------------------------------------------------------


class WithGradient(nn.Module):
    """One attention as everywhere, and one inside a gradient that the model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = TinyLM(1), TinyLM(1)

    def forward(self, tokens: Tensor) -> Tensor:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.inner, weights, (tokens,)).square().mean()

        weights = dict(self.inner.named_parameters())
        return self.outer(tokens) + torch.func.grad(loss)(weights)["head.bias"]


def test_attention_inside_a_gradient_that_the_model_takes_is_declined_by_name() -> None:
    first, second = outcome(sparsified(WithGradient(), forward))
    assert first == ("outer.layers.0", SPARSE)
    assert second[0] == "inner.layers.0"
    assert "inside torch.vmap or torch.func" in second[1]


class Disabled(TinyLM):
    """Layers that Dynamo is told to leave out."""

    def __init__(self, *layers: int) -> None:
        super().__init__()
        for i in layers:
            self.layers[i].forward = torch.compiler.disable(self.layers[i].forward)


def test_a_layer_under_compiler_disable_is_named_beside_those_that_are_sparse() -> None:
    report = sparsified(Disabled(0), forward)
    (_, outside), last = sorted(outcome(report))
    assert outside.startswith("runs outside of every compiled graph: torch.compiler.disable keeps")
    assert last == ("layers.1", SPARSE)
    assert report.failures == ["layers.0 is under torch.compiler.disable"]


def mapped_from_outside(model: nn.Module) -> Tensor:
    return torch.vmap(lambda row: model(row[None])[0])(X)


UNCOMPILED = [(lambda: Disabled(0, 1), forward), (TinyLM, mapped_from_outside)]


@pytest.mark.parametrize(("make", "call"), UNCOMPILED, ids=["disable", "vmap around"])
def test_a_call_of_which_nothing_is_compiled_is_not_silent(make, call) -> None:
    model = make()
    dense = call(model)
    moonfx.sparsify(model, BLOCK, FEW, compiler="eager")
    with pytest.warns(UserWarning, match="nothing of .* was compiled, and it runs dense"):
        assert torch.equal(call(model), dense)
    moonfx.sparsify(model, BLOCK, FEW, compiler="eager", on_miss="raise")
    with pytest.raises(NothingRewritten, match="nothing of .* was compiled"):
        call(model)
    assert torch.equal(call(model), dense)
