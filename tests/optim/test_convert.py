"""An AdamW becomes Muon: groups, momentum, update sizes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

import moonfx
from moonfx.kernels.reference.newton_schulz import JORDAN
from tests.support.optim.conversions import (
    Matrix,
    cosine,
    moved,
    same,
    signal_and_noise,
    snapshot,
)
from tests.support.optim.nets import ON_MUON, Net, net, train
from tests.support.optim.sources import stepped

pytestmark = pytest.mark.filterwarnings("error")


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
    kinds = [[muon.on_muon(p) for p in group["params"]] for group in muon.param_groups]
    assert kinds == [[False, True, True, False], [False] * 4]
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
    hidden = [p for n, p in model.named_parameters() if n in ON_MUON]
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
