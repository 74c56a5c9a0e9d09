"""An AdamW becomes Muon and goes back: groups, momentum, update sizes, and what is refused."""

import copy
import inspect
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

import moonfx
from moonfx.kernels.reference.newton_schulz import JORDAN
from moonfx.optim.checks import MOMENTUM_DTYPES
from moonfx.optim.settings import GROUP_KEYS, PARAMETER_KEYS
from moonfx.optim.state.adamw import Source
from moonfx.optim.state.floats import dequantized
from tests.support.optim.nets import MUON, Net, net, train
from tests.support.optim.sources import BitsandbytesAdamW, FusedAdam, stepped

torchao = pytest.importorskip("torchao.optim", reason="needs torchao")

pytestmark = pytest.mark.filterwarnings("error")


def snapshot(optimizer: Optimizer) -> Any:
    """All that an optimizer holds, with the keys in order and which objects they are."""
    groups = [
        (
            id(g),
            [id(p) for p in g["params"]],
            [(k, copy.deepcopy(v)) for k, v in g.items() if k != "params"],
        )
        for g in optimizer.param_groups
    ]
    states = [
        (id(p), [(k, id(v), v.clone() if isinstance(v, Tensor) else v) for k, v in s.items()])
        for p, s in optimizer.state.items()
    ]
    return groups, states, sorted(vars(optimizer))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# --- groups ---------------------------------------------------------------------------------------


def grouped(model: Net) -> AdamW:
    """Two groups with keys of their own, as training scripts make them."""
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    return AdamW(
        [
            {"params": decay, "weight_decay": 0.1, "lr": 1e-3, "tag": "matrices"},
            {"params": rest, "weight_decay": 0.0, "lr": 2e-3, "lr_scale": 0.5},
        ],
        betas=(0.9, 0.95),
    )


def test_the_groups_stay_the_same_dicts_and_come_back_key_by_key() -> None:
    model = net()
    adamw = grouped(model)
    train(model, adamw, range(2))
    before, dicts = snapshot(adamw)[0], list(adamw.param_groups)
    muon = moonfx.convert_optimizer(adamw, model)
    assert [g["tag"] for g in muon.param_groups[:1]] == ["matrices"]
    assert muon.param_groups[1]["lr_scale"] == 0.5
    assert all(a is b for a, b in zip(muon.param_groups, dicts, strict=True))
    assert muon.param_groups[0]["optimizers"] == ["adamw", "muon", "muon", "adamw"]
    assert muon.param_groups[1]["optimizers"] == ["adamw"] * 4
    train(model, muon, range(2, 4))
    back = moonfx.to_adamw(muon)
    assert type(back) is AdamW
    assert same(snapshot(back)[0], before)
    train(model, back, range(4, 6))


def test_named_parameters_name_the_rows_without_a_model() -> None:
    model = net()
    with pytest.warns(UserWarning, match="no model was given"):
        muon = moonfx.convert_optimizer(AdamW(model.named_parameters()))
    assert [row.name for row in moonfx.roles(muon).rows] == [n for n, _ in model.named_parameters()]


def test_without_names_the_rows_are_named_by_their_places() -> None:
    with pytest.warns(UserWarning, match="no model was given"):
        muon = moonfx.convert_optimizer(AdamW([nn.Parameter(torch.randn(8, 8))]))
    assert [row.name for row in moonfx.roles(muon).rows] == ["param_groups[0].params[0]"]


def test_without_a_model_one_warning_points_at_the_caller_and_with_one_there_is_none() -> None:
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moonfx.convert_optimizer(AdamW(model.named_parameters()))
    assert [w.filename for w in caught] == [__file__]
    assert "names and shapes" in str(caught[0].message)
    moonfx.convert_optimizer(AdamW(model.named_parameters()), model)  # warnings are errors here


def test_adam_keeps_its_coupled_decay_and_each_group_its_own() -> None:
    model = net()
    groups = [{"params": [model.up.weight]}, {"params": [model.down.weight]}]
    adam = Adam(groups, weight_decay=0.1)
    adam.param_groups[1]["decoupled_weight_decay"] = True
    muon = moonfx.convert_optimizer(adam, model)
    assert [g["decay"] for g in muon.param_groups] == ["coupled", "decoupled"]
    muon = moonfx.convert_optimizer(Adam(model.parameters()), model, decay="cautious")
    assert [g["decay"] for g in muon.param_groups] == ["cautious"]


# --- the momentum ---------------------------------------------------------------------------------


def moved(parameter: nn.Parameter, optimizer: Optimizer, grad: Tensor) -> Tensor:
    """How far one step moves a parameter."""
    before = parameter.detach().clone()
    parameter.grad = grad.clone()
    optimizer.step()
    return parameter.detach() - before


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


def signal_and_noise(count: int, signal: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(64, 64, generator=generator)
    return [signal * fixed + torch.randn(64, 64, generator=generator) for _ in range(count)]


class Matrix:
    """One hidden matrix, 64 x 64 of zeros, with an AdamW and a model around it."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.ModuleDict(
            {"hidden": nn.Linear(64, 64, bias=False), "norm": nn.RMSNorm(64)}
        )
        self.weight = self.model["hidden"].weight
        nn.init.zeros_(self.weight)
        self.adamw = AdamW([self.weight], lr=1e-3, weight_decay=0.0, **options)

    def converted(self, **options: Any) -> moonfx.Muon:
        roles = {"hidden.weight": "muon"}
        return moonfx.convert_optimizer(self.adamw, self.model, roles=roles, **options)


def test_a_warm_start_is_far_nearer_to_a_run_that_was_always_muon() -> None:
    *earlier, last = signal_and_noise(301)
    found = {}
    for start in ("always", "warm", "cold"):
        matrix = Matrix()
        optimizer = matrix.converted() if start == "always" else matrix.adamw
        for grad in earlier:
            moved(matrix.weight, optimizer, grad)
        if start == "cold":
            matrix.adamw.state.clear()
        if start != "always":
            optimizer = matrix.converted()
        found[start] = moved(matrix.weight, optimizer, last)
    # By hand, in another program: 0.864 and 0.356.
    assert cosine(found["warm"], found["always"]) == pytest.approx(0.86, abs=0.03)
    assert cosine(found["cold"], found["always"]) == pytest.approx(0.36, abs=0.05)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sums_and_averages_of_gradients_give_the_same_first_update(nesterov) -> None:
    *earlier, last = signal_and_noise(21)
    matrix = Matrix()
    for grad in earlier:
        moved(matrix.weight, matrix.adamw, grad)
    mean = matrix.adamw.state[matrix.weight]["exp_avg"] / (1 - 0.9**20)
    total = mean / (1 - 0.95)  # Moonlight's convention: M <- mu M + g
    total = 0.95 * total + last
    x = 0.95 * total + last if nesterov else total
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = JORDAN[0] * x + (JORDAN[1] * a + JORDAN[2] * a @ a) @ x
    update = moved(matrix.weight, matrix.converted(nesterov=nesterov), last)
    assert cosine(update, -x) > 0.999  # the operator computes in bfloat16


@pytest.mark.parametrize(
    ("rms", "expected"), [(0.2, 0.2), (0.1, 0.1), ("betas", 0.2294), ("measured", None)]
)
@pytest.mark.parametrize("exact", [False, True])
def test_the_first_update_has_the_rms_asked_for(rms, expected, exact) -> None:
    model = net()
    hidden = [p for n, p in model.named_parameters() if n in MUON]
    adamw = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    stepped(adamw, 30)
    before = copy.deepcopy(hidden)
    stepped(adamw, 1, seed=2)
    own = sizes(before, hidden)
    muon = moonfx.convert_optimizer(adamw, model, rms=rms, exact_rms=exact)
    before = copy.deepcopy(hidden)
    stepped(muon, 1, seed=2)
    wanted = own if expected is None else [expected] * 2
    # bfloat16 rounds to 0.4 %; matrices of 2,048 entries do not quite have their law's spectrum.
    assert sizes(before, hidden) == pytest.approx(wanted, rel=0.01 if exact else 0.05)


def sizes(before: list[nn.Parameter], now: list[nn.Parameter]) -> list[float]:
    """RMS of each update at learning rate 1."""
    with torch.no_grad():
        return [float((a - b).square().mean().sqrt() / 1e-3) for a, b in zip(before, now)]


# --- and back -------------------------------------------------------------------------------------


def test_before_its_first_step_the_very_optimizer_comes_back() -> None:
    model = net()
    adamw = AdamW(model.parameters())
    train(model, adamw, range(3))
    before = snapshot(adamw)
    muon = moonfx.convert_optimizer(adamw, model)
    assert same(snapshot(adamw)[1], before[1])
    assert moonfx.to_adamw(muon) is adamw
    assert same(snapshot(adamw)[:2], before[:2])
    train(model, adamw, range(3, 5))
    with pytest.raises(RuntimeError, match="call step\\(\\) of what moonfx.to_adamw returned"):
        muon.step()


def test_hooks_follow_to_muon_and_back_and_fire_once_each_step() -> None:
    model = net()
    optimizer: Optimizer = AdamW(model.parameters())
    fired: list[str] = []
    handle = optimizer.register_step_post_hook(lambda o, *_: fired.append(type(o).__name__))
    train(model, optimizer, range(1))
    optimizer = moonfx.convert_optimizer(optimizer, model)
    train(model, optimizer, range(1, 3))
    optimizer = moonfx.to_adamw(optimizer)
    train(model, optimizer, range(3, 4))
    assert fired == ["AdamW", "Muon", "Muon", "AdamW"]
    handle.remove()
    train(model, optimizer, range(4, 5))
    assert len(fired) == 4


def test_a_muon_out_of_a_pickle_goes_back_too() -> None:
    model = net()
    adamw = AdamW(model.parameters())
    train(model, adamw, range(2))
    muon = moonfx.convert_optimizer(adamw, model)
    train(model, muon, range(2, 4))
    again, copied = pickle.loads(pickle.dumps((muon, model)))
    assert [r.name for r in moonfx.roles(again).rows] == [n for n, _ in model.named_parameters()]
    for m, optimizer in ((model, muon), (copied, again)):
        train(m, moonfx.to_adamw(optimizer), range(4, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters()))


def rms_of_updates(matrix: Matrix, optimizer: Optimizer, grads: list[Tensor]) -> Tensor:
    """Of each step at learning rate 1."""
    return torch.tensor(
        [moved(matrix.weight, optimizer, g).square().mean().sqrt() / 1e-3 for g in grads]
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("first", [0, 60], ids=["from scratch", "mid-run"])
def test_no_update_jumps_on_the_way_back(betas, signal, first) -> None:
    grads = signal_and_noise(200, signal)
    away, stayed = Matrix(betas=betas), Matrix(betas=betas)
    rms_of_updates(away, away.adamw, grads[:first])
    muon = away.converted()
    rms_of_updates(away, muon, grads[first:160])
    rms_of_updates(stayed, stayed.adamw, grads[:160])
    usual = rms_of_updates(stayed, stayed.adamw, grads[160:])
    found = rms_of_updates(away, moonfx.to_adamw(muon), grads[160:])
    # Known noise: as large as AdamW's own, less the quarter that Muon's longer average has less of
    # noise in. Unknown, for want of an AdamW state: taken for noise alone, so smaller where it is
    # not. With v of the buffer's own size it would be up to 4.5 times the usual.
    assert float((found / usual).max()) < 1.2
    assert float((found / usual).min()) > (0.75 if first else 0.25)


BACK: list[tuple[str, Callable[[Any], Optimizer], bool, float]] = [
    # name, the optimizer, whether its momentum is kept in 8 bits, error of its moments
    ("AdamW", AdamW, False, 1e-5),
    ("AdamW fused", lambda p: AdamW(p, fused=True), False, 1e-5),
    ("torchao 8-bit", torchao.AdamW8bit, True, 0.05),
    ("torchao fp8", torchao.AdamWFp8, True, 0.05),
    ("bitsandbytes", BitsandbytesAdamW, False, 1e-5),
    ("bitsandbytes 8-bit", lambda p: BitsandbytesAdamW(p, bits=8), True, 0.05),
    ("Apex", FusedAdam, False, 1e-5),
]


@pytest.mark.parametrize(
    ("make", "eight", "tolerance"), [b[1:] for b in BACK], ids=[b[0] for b in BACK]
)
def test_every_kind_goes_to_muon_and_back_and_on(make, eight, tolerance) -> None:
    model = net()
    start = make(model.parameters())
    train(model, start, range(3))
    form = {k: type(v) for k, v in start.state[model.up.weight].items()}
    muon = moonfx.convert_optimizer(start, model)
    train(model, muon, range(3, 6))
    buffers = {n: muon.state[model.get_parameter(n)]["momentum_buffer"] for n in MUON}
    assert {type(b).__name__ for b in buffers.values()} == {"OptimState8bit" if eight else "Tensor"}
    momentum = {n: dequantized(b).float() for n, b in buffers.items()}
    back = moonfx.to_adamw(muon)
    assert type(back) is type(start)
    assert {k: type(v) for k, v in back.state[model.up.weight].items()} == form
    source = Source(back)
    for name in MUON:
        p = model.get_parameter(name)
        first, second = source.first_moment(p), source.second_moment(p)
        assert first is not None
        assert second is not None
        expected = momentum[name] * (1 - 0.9**6)
        assert (first - expected).norm() < tolerance * expected.norm()
        assert source.steps(p, back.param_groups[0]) == 6
        assert (second >= 0).all()
    train(model, back, range(6, 8))


# --- bad input ------------------------------------------------------------------------------------

Case = tuple[Any, dict[str, Any]]


def case(taken: int = 1, **options: Any) -> Case:
    """An AdamW over a Net after some steps, and convert_optimizer's other arguments."""
    model = net()
    adamw = AdamW(model.parameters())
    train(model, adamw, range(taken))
    return adamw, {"model": model, **options}


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
    model = nn.ParameterDict({"spectrum": torch.zeros(4, 4, dtype=torch.complex64)})
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
    ("complex", complex_parameter, ValueError, "spectrum is complex"),
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


@pytest.mark.parametrize("key", [*GROUP_KEYS, *PARAMETER_KEYS])
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


def test_the_way_back_refuses_what_is_no_muon_what_went_back_and_nan() -> None:
    adamw, options = case()
    with pytest.raises(TypeError, match="must be a moonfx.Muon, got AdamW"):
        moonfx.to_adamw(adamw)
    muon = moonfx.convert_optimizer(adamw, **options)
    train(options["model"], muon, range(1))
    buffer = muon.state[options["model"].up.weight]["momentum_buffer"]
    kept, buffer[0, 0] = float(buffer[0, 0]), math.nan
    with pytest.raises(ValueError, match="the momentum of up.weight holds NaN"):
        moonfx.to_adamw(muon)
    buffer[0, 0] = kept
    train(options["model"], muon, range(1))
    moonfx.to_adamw(muon)
    with pytest.raises(ValueError, match="has gone back to AdamW already"):
        moonfx.to_adamw(muon)
    for look in (moonfx.roles, moonfx.update_rms):
        with pytest.raises(TypeError, match="must be a moonfx.Muon, got AdamW"):
            look(adamw)
