"""What a conversion refuses, by name, and leaves untouched."""

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import moonfx
from moonfx.optim.checks import MOMENTUM_DTYPES
from moonfx.optim.settings import GROUP_KEYS
from tests.support.optim.conversions import (
    Case,
    case,
    same,
    snapshot,
)
from tests.support.optim.nets import net, train

pytestmark = pytest.mark.filterwarnings("error")


def unsuitable(**options: Any) -> Case:
    model = net()
    return AdamW(model.parameters(), **options), {"model": model}


def with_state(key: str, value: float) -> Case:
    adamw, options = case()
    adamw.state[options["model"].down.weight][key][3, 4] = value
    return adamw, options


def with_shape() -> Case:
    adamw, options = case()
    adamw.state[options["model"].down.weight]["exp_avg"] = torch.zeros(4, 4)
    return adamw, options


def without_moment() -> Case:
    adamw, options = case()
    del adamw.state[options["model"].down.weight]["exp_avg_sq"]
    return adamw, options


def foreign() -> Case:
    adamw, options = case()
    return adamw, {"model": copy.deepcopy(options["model"])}


def half_foreign() -> Case:
    model = net()
    stranger = nn.Parameter(torch.zeros(3, 5))
    named = [*model.named_parameters(), ("stranger", stranger)]
    return AdamW(named), {"model": model}


def complex_parameter() -> Case:
    model = nn.ModuleDict({"spectrum": nn.Linear(4, 4, dtype=torch.complex64)})
    return AdamW(model.parameters()), {"model": model}


def sparse_gradient() -> Case:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 9))
    model(torch.tensor([1, 2])).sum().backward()
    return AdamW(model.parameters()), {"model": model}


def vectors_only() -> Case:
    model = nn.LayerNorm(8)
    return AdamW(model.parameters()), {"model": model}


def flattened() -> Case:
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(100_000)))
    return AdamW(model.parameters()), {"model": model}


def converted() -> Case:
    adamw, options = case()
    return moonfx.convert_optimizer(adamw, **options), options


def converted_before() -> Case:
    adamw, options = case()
    moonfx.convert_optimizer(adamw, **options)
    return adamw, options


def wrapped() -> Case:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(AdamW(net().parameters())), {}


def embeddings_only() -> Case:
    model = nn.Embedding(10, 4)
    return AdamW(model.parameters()), {"model": model}


OF_ADAMW: list[tuple[str, Callable[[], Case], type[Exception], str]] = [
    # name, the arguments, the error, what it says. state/test_adamw.py has other optimizers.
    ("no optimizer", lambda: (net(), {}), TypeError, "must be a torch.optim.Optimizer, got Net"),
    ("SGD", lambda: (torch.optim.SGD(net().parameters(), lr=0.1), {}), TypeError, "class SGD"),
    ("LBFGS", lambda: (torch.optim.LBFGS(net().parameters()), {}), TypeError, "needs a closure"),
    ("amsgrad", lambda: unsuitable(amsgrad=True), ValueError, "amsgrad=True, which divides by"),
    ("differentiable", lambda: unsuitable(differentiable=True), ValueError, "differentiable=True"),
    ("converted already", converted, TypeError, "is a moonfx.Muon already"),
    ("an AdamW that was converted", converted_before, ValueError, "goes on with what"),
    ("Accelerate's", wrapped, TypeError, "AcceleratedOptimizer, a wrapper"),
    ("a copy of the model", foreign, ValueError, "this Net does not own 8 of .* parameter 0"),
    ("another parameter", half_foreign, ValueError, r"does not own 1 of .* stranger \[3, 5\]"),
    ("NaN", lambda: with_state("exp_avg", math.nan), ValueError,
     "the first moment of down.weight holds NaN"),
    ("infinity", lambda: with_state("exp_avg_sq", math.inf), ValueError,
     "the second moment of down.weight holds NaN or infinity"),
    ("no second moment", without_moment, ValueError, "state of down.weight has no second moment"),
    ("a moment of another shape", with_shape, ValueError, r"down.weight has shape \[4, 4\]"),
    ("complex", complex_parameter, ValueError, "spectrum.weight is complex.*leave it on AdamW"),
    ("sparse gradient", sparse_gradient, ValueError, "0.weight's gradient is sparse"),
    ("vectors only", vectors_only, ValueError, "no parameter goes to Muon: all 2 stay on AdamW"),
    ("a flattened shard", flattened, ValueError, "FSDP1 .* DeepSpeed"),
    ("embeddings only", embeddings_only, ValueError, "1 embedding; .* roles="),
]  # fmt: skip

OF_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # argument, the error, what it says
    ({"rms": 0}, ValueError, "rms must be a number above 0 or one of 'betas', 'measured', got 0"),
    ({"rms": math.inf}, ValueError, "rms must be a number above 0"),
    ({"rms": "moonlight"}, ValueError, "got 'moonlight'"),
    ({"rms": True}, TypeError, r"got True \(bool\)"),
    ({"rms": None}, TypeError, "got None"),
    ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number in"),
    ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ({"exact_rms": "yes"}, TypeError, "exact_rms must be True or False"),
    ({"compile": "yes"}, TypeError, "compile must be True or False"),
    ({"steps": 0}, ValueError, "steps must be at least 1, not 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer"),
    ({"coefficients": "newton"}, ValueError, "coefficients must be one of muon, quintic"),
    ({"coefficients": [(1.0, 2.0)]}, ValueError, "three finite numbers"),
    ({"coefficients": "deepseek_v4"}, ValueError, "give steps=10, not 5"),
    ({"decay": "none"}, ValueError, "decay must be None .* 'decoupled', 'cautious', 'coupled'"),
    ({"momentum_dtype": "int7"}, ValueError, "momentum_dtype must be None"),
    ({"roles": ["up.weight"]}, TypeError, "roles must be a mapping"),
    ({"roles": {"upp.weight": "muon"}}, ValueError, "no parameter has that name; nearest: up.w"),
    ({"roles": {"up.weight": "moon"}}, ValueError, "did you mean 'muon'"),
    ({"roles": {"up.bias": "muon"}}, ValueError, "up.bias"),
    ({"example": torch.zeros(1)}, TypeError, "example must be a tuple .* or a dict .* got Tensor"),
    ({"model": None, "example": ()}, ValueError, "example needs model="),
    ({"model": "Net"}, TypeError, "model must be a torch.nn.Module or None, got str"),
]


@pytest.mark.parametrize(
    ("make", "kind", "words"), [r[1:] for r in OF_ADAMW], ids=[r[0] for r in OF_ADAMW]
)
def test_what_cannot_be_converted_is_named_and_left_untouched(make, kind, words) -> None:
    adamw, options = make()
    before = snapshot(adamw) if isinstance(adamw, Optimizer) else None
    with pytest.raises(kind, match=words):
        moonfx.convert_optimizer(adamw, **options)
    if before is not None:
        assert same(snapshot(adamw), before)


@pytest.mark.parametrize(
    ("options", "kind", "words"), OF_ARGUMENTS, ids=[str(r[0]) for r in OF_ARGUMENTS]
)
def test_a_bad_argument_is_named_and_the_optimizer_is_left_untouched(options, kind, words) -> None:
    adamw, arguments = case(**options)
    before = snapshot(adamw)
    with pytest.raises(kind, match=words):
        moonfx.convert_optimizer(adamw, **arguments)
    assert same(snapshot(adamw), before)
    if arguments["model"] is not None and not isinstance(arguments["model"], str):
        train(arguments["model"], adamw, range(1, 2))


def test_the_documentation_names_the_momentum_dtypes_that_are_taken_and_no_other() -> None:
    documented = inspect.getdoc(moonfx.convert_optimizer).split("momentum_dtype: ")[1]
    words = set(re.findall(r'"(\w+)"', documented.split("compile: ")[0]))
    assert words == {word for word in MOMENTUM_DTYPES if word}


class AdamWithNesterov(AdamW):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.defaults["nesterov"] = True
        self.param_groups[0]["nesterov"] = True


@pytest.mark.parametrize("key", GROUP_KEYS)
def test_a_key_of_the_users_own_that_muon_would_overwrite_is_refused(key) -> None:
    model = net()
    optimizer = AdamW([{"params": model.parameters(), key: "mine"}])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"param_groups\[0\].*key '{key}'.*rename it"):
        moonfx.convert_optimizer(optimizer, model)
    assert same(before, snapshot(optimizer))


def test_a_key_that_the_class_itself_reads_is_refused_as_its_own() -> None:
    model = net()
    with pytest.raises(ValueError, match="key 'nesterov'.*AdamWithNesterov itself reads it"):
        moonfx.convert_optimizer(AdamWithNesterov(model.parameters()), model)


def test_measured_needs_a_state() -> None:
    adamw, options = case(taken=0, rms="measured")
    with pytest.raises(ValueError, match="there is none yet: take a few AdamW steps first"):
        moonfx.convert_optimizer(adamw, **options)
