"""Two processes with shards of a model hand over, and take back, what one with the whole does."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import moonfx
from tests.support.optim.nets import ON_MUON, net, train


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def handed_over(mesh: Any = None) -> dict[str, Any]:
    """What a model has after steps of AdamW, of Muon with a checkpoint between, and of AdamW."""
    model = net()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    hidden = [model.get_parameter(name) for name in ON_MUON]
    adamw = AdamW(model.parameters(), lr=1e-3)
    train(model, adamw, range(3))
    muon = moonfx.convert_optimizer(adamw, model)
    ratios = [muon.facts[p].second_moment for p in hidden]
    momenta = [whole(muon.state[p]["momentum_buffer"]).clone() for p in hidden]
    train(model, muon, range(3, 4))
    set_optimizer_state_dict(model, muon, get_optimizer_state_dict(model, muon))
    train(model, muon, range(4, 5))
    back = moonfx.to_adamw(muon)
    second = [back.state[p]["exp_avg_sq"] for p in hidden]
    placed = [s.placements == p.placements for s, p in zip(second, hidden)] if mesh else []
    estimates = [whole(s).clone() for s in second]
    train(model, back, range(5, 6))
    weights = [whole(p.detach()) for p in model.parameters()]
    found = {"ratios": [r for r in ratios if r is not None], "placed": placed}
    return {**found, "tensors": [*momenta, *estimates, *weights]}


def process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.save(handed_over(mesh), Path(folder) / f"{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hand_over_what_one_does(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}") for rank in (0, 1))
    alone = handed_over()
    assert first["ratios"] == second["ratios"] == pytest.approx(alone["ratios"], rel=1e-3)
    assert first["placed"] == [True, True]
    for a, b, c in zip(first["tensors"], second["tensors"], alone["tensors"], strict=True):
        assert torch.equal(a, b)
        # Both processes see the same batch; Newton-Schulz in bfloat16 rounds apart what is near.
        torch.testing.assert_close(a, c, rtol=1e-2, atol=1e-4)
