"""A Muon goes back to AdamW: hooks, update sizes, every kind of AdamW."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import moonfx
from moonfx.optim.state.adamw import Source
from moonfx.optim.state.floats import dequantized
from tests.support.optim.conversions import Matrix, case, moved, same, signal_and_noise, snapshot
from tests.support.optim.nets import ON_MUON, net, train
from tests.support.optim.sources import BitsandbytesAdamW, FusedAdam

torchao = pytest.importorskip("torchao.optim", reason="needs torchao")

pytestmark = pytest.mark.filterwarnings("error")


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
    buffers = {n: muon.state[model.get_parameter(n)]["momentum_buffer"] for n in ON_MUON}
    assert {type(b).__name__ for b in buffers.values()} == {"OptimState8bit" if eight else "Tensor"}
    momentum = {n: dequantized(b).float() for n, b in buffers.items()}
    back = moonfx.to_adamw(muon)
    assert type(back) is type(start)
    assert {k: type(v) for k, v in back.state[model.up.weight].items()} == form
    source = Source(back)
    for name in ON_MUON:
        p = model.get_parameter(name)
        first, second = source.first_moment(p), source.second_moment(p)
        assert first is not None
        assert second is not None
        expected = momentum[name] * (1 - 0.9**6)
        assert (first - expected).norm() < tolerance * expected.norm()
        assert source.steps(p, back.param_groups[0]) == 6
        assert (second >= 0).all()
    train(model, back, range(6, 8))


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
