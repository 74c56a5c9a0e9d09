"""A momentum in 8 bits: what is rounded, what it saves, and that training goes on with it."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from moonfx.optim.muon import Muon
from moonfx.optim.state import low_bit
from tests.support.optim.by_hand import muon

pytest.importorskip("torchao")


def made(kind: str | None, lr: float = 0.02) -> tuple[nn.Sequential, Muon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32, bias=False))
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return model, muon(adamw, momentum_dtype=kind)


def train(model: nn.Module, optimizer: Muon, steps: int, first: int = 0) -> float:
    """Fits a fixed map from noisy batches; the last loss."""
    target = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) / 8
    loss = torch.tensor(0.0)
    for i in range(first, first + steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(100 + i))
        optimizer.zero_grad()
        loss = (model(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_training_with_codes_ends_where_training_with_floats_does() -> None:
    first = train(*made(None), 1)
    with_floats, with_codes = (train(*made(k), 60) for k in (None, "int8"))
    assert with_floats < 0.5 * first
    assert abs(with_codes / with_floats - 1) < 0.05


def test_only_what_the_next_step_averages_with_was_rounded() -> None:
    """The first update is the one that a float momentum gives, bit for bit."""
    (model, plain), (coded_model, coded) = made(None), made("int8")
    train(model, plain, 1)
    train(coded_model, coded, 1)
    for a, b in zip(model.parameters(), coded_model.parameters(), strict=True):
        assert torch.equal(a, b)
    p, q = model[0].weight, coded_model[0].weight
    exact, rounded = plain.state[p]["momentum_buffer"], coded.state[q]["momentum_buffer"]
    assert low_bit.has_codes(rounded)
    assert rounded.shape == exact.shape
    # Half the distance of two codes next to the largest of a block.
    error = (low_bit.floats(rounded) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.9 / 64 / 2


TAKEN = [
    ((64, 64), None),
    ((32, 64), "2048 numbers are fewer than 4096"),
    ((64, 65), "4160 numbers are no whole blocks of 2048"),
]


@pytest.mark.parametrize(("shape", "why"), TAKEN)
def test_the_table_says_which_momentum_stays_in_floats(shape, why) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = muon(torch.optim.AdamW([p]), momentum_dtype="int8")
    p.grad = torch.randn(shape)
    optimizer.step()
    assert low_bit.has_codes(optimizer.state[p]["momentum_buffer"]) == (why is None)
    note = f"; its momentum stays in floats: {why}" if why else ""
    assert optimizer.table[0].why == f"a test says so{note}"


COPIES = [
    ("deepcopy", copy.deepcopy),
    ("pickle", lambda x: pickle.loads(pickle.dumps(x))),
]


@pytest.mark.parametrize("again", [x[1] for x in COPIES], ids=[x[0] for x in COPIES])
def test_a_copy_goes_on_bit_for_bit(again) -> None:
    model, optimizer = made("int8")
    train(model, optimizer, 2)
    twin_model, twin = again((model, optimizer))
    train(model, optimizer, 2, 5)
    train(twin_model, twin, 2, 5)
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_in_a_file_resumes_bit_for_bit(tmp_path) -> None:
    model, optimizer = made("int8")
    train(model, optimizer, 2)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    train(model, optimizer, 2, 2)
    other, resumed = made("int8")
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, 2, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_codes_are_the_nearest_entries_of_torchaos_map() -> None:
    torch.manual_seed(0)
    entries = low_bit.zeros(torch.empty(64, 64), "int8").qmap
    middles = (entries[1:] + entries[:-1]) / 2
    edges = [entries, middles, middles.nextafter(entries[1:]), middles.nextafter(entries[:-1])]
    values = torch.cat([*edges, torch.randn(20000), torch.randn(2000) * 1e-5])[: 5 * 2048]
    values = torch.cat([values, torch.randn(12 * 2048)]).clamp(-1, 1)[: 17 * 2048].reshape(17, 2048)
    values[:, 0] = 1.0  # a scale of 1 for each block
    mine, torchaos = (low_bit.zeros(values, "int8") for _ in range(2))
    low_bit.write(mine, values)
    torchaos.copy_(values)
    nearest = (values[..., None] - entries).abs().amin(-1)
    error = (low_bit.floats(mine) - values).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-7)  # of a middle, either is
    assert torch.equal(mine.scale, torchaos.scale)
    # torchao compares with half a distance, not with the middle: a rounding apart.
    assert (mine.codes.int() - torchaos.codes.int()).abs().max() <= 1
    assert (mine.codes != torchaos.codes).float().mean() < 0.02


def test_a_momentum_that_is_not_finite_does_not_become_finite() -> None:
    values = torch.randn(2, 4096)
    values[0, 5], values[1, 5] = torch.nan, torch.inf
    kept = low_bit.stored(values, values, "int8")
    found = low_bit.floats(kept)
    assert not found[0, 5].isfinite()
    assert not found[1, 5].isfinite()
    assert found[:, 2048:].isfinite().all()


def test_a_momentum_in_floats_is_kept_as_it_is() -> None:
    p, momentum = torch.randn(2, 64, 64)
    assert low_bit.stored(p, momentum, None) is momentum
    assert low_bit.stored(p[:4], momentum[:4], "int8").dtype == torch.float32


def test_without_torchao_one_error_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = muon(torch.optim.AdamW([p]), momentum_dtype="int8")
    p.grad = torch.randn(64, 64)
    before = p.detach().clone()
    with pytest.raises(
        ValueError, match=r"needs torchao.*pip install torchao, or momentum_dtype=None"
    ):
        optimizer.step()
    assert torch.equal(p, before)
