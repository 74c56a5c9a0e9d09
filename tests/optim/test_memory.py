"""How many bytes the state of Muon's parameters has, by what it holds and would hold otherwise."""

import sys

import pytest
import torch
from torch import nn

from moonfx.optim.memory import size_of, state_memory
from moonfx.optim.state import low_bit
from tests.support.optim.by_hand import muon


def test_the_state_is_half_of_adamws_and_an_eighth_with_int8() -> None:
    pytest.importorskip("torchao")
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


def test_before_a_step_nothing_is_held_and_what_would_be_is_known() -> None:
    optimizer = muon(torch.optim.AdamW([nn.Parameter(torch.zeros(8, 6, dtype=torch.bfloat16))]))
    found = state_memory(optimizer)
    assert found[:4] == (48, 2 * 96 + 4, 0, 96 + 4)
    assert "state of the 48 numbers that Muon steps" in str(found)


def test_what_adamw_steps_is_not_counted() -> None:
    matrix, gain = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(6))
    both = muon(torch.optim.AdamW([matrix, gain]))
    alone = muon(torch.optim.AdamW([matrix]))
    assert state_memory(both) == state_memory(alone)
    assert state_memory(muon(torch.optim.AdamW([gain])))[:2] == (0, 0)


def test_the_size_of_a_wrapper_is_that_of_what_it_wraps() -> None:
    pytest.importorskip("torchao")
    coded = low_bit.zeros(torch.empty(64, 64), "int8")
    parts = [getattr(coded, name) for name in coded.__tensor_flatten__()[0]]
    assert size_of(coded) == sum(x.nbytes for x in parts)
    assert 64 * 64 < size_of(coded) < 2 * 64 * 64
    assert size_of(torch.zeros(3, dtype=torch.float64)) == 24


def test_what_codes_would_take_is_known_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what another state would take, and makes none."""
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    found = state_memory(muon(torch.optim.AdamW([nn.Parameter(torch.zeros(64, 64))])))
    assert found.int8 == 64 * 64 + 2 * 4 + 256 * 4 + 4
    small = state_memory(muon(torch.optim.AdamW([nn.Parameter(torch.zeros(8, 6))])))
    assert small.int8 == small.muon == 8 * 6 * 4 + 4
