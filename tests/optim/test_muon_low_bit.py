"""A momentum in 8 bits: what is rounded, what it saves, and that training goes on with it."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from moonfx.optim import low_bit
from moonfx.optim.memory import state_memory
from moonfx.optim.muon import Muon
from tests.optim.by_hand import muon

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


def test_the_state_is_half_of_adamws_and_an_eighth_with_int8() -> None:
    p = nn.Parameter(torch.zeros(512, 512))
    for kind, share in ((None, 0.5), ("int8", 0.125)):
        optimizer = muon(torch.optim.AdamW([p]), momentum_dtype=kind)
        p.grad = torch.ones_like(p)
        optimizer.step()
        found = state_memory(optimizer)
        adamw = torch.optim.AdamW([p])
        adamw.step()
        assert found.adamw == sum(x.nbytes for x in adamw.state[p].values())
        # A scale per 2048 codes is 0.0002 of AdamW's state, the map of 1 KB nothing in the large.
        assert abs(found.held / found.adamw - share) < 1e-3
        assert found.held == (found.muon if kind is None else found.int8)
        assert f"{found.held:,}" in str(found)


def test_a_momentum_that_is_converted_is_rounded_once() -> None:
    p = torch.randn(64, 64)
    momentum = torch.randn(64, 64)
    kept = low_bit.stored(p, momentum, "int8")
    again = low_bit.zeros(p, "int8")
    again.copy_(momentum)
    assert torch.equal(kept.codes, again.codes)
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
