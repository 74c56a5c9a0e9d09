"""Two processes with shards of a model step as one process with the whole of it."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moonfx.optim.matrices import Layout
from moonfx.optim.step import update as step
from tests.support.optim.by_hand import Row, muon

HOW: list[dict[str, Any]] = [
    {},
    dict(decay="cautious", exact_rms=True, nesterov=False),
    dict(decay="coupled", momentum_dtype="int8"),
]
# Shards of 5 rows are of 3 and 2, and of 1 row of 1 and none.
ROWS = [
    *(Row("first", layout=Layout(sizes=(4, 1))), Row("bias", "adamw")),
    *(Row("second"), Row("one row"), Row("wide")),
]


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 5), nn.Linear(5, 8, bias=False), nn.Linear(8, 1, bias=False)),
        nn.Linear(1, 8192, bias=False),
    )


def steps(model: nn.Module, how: dict[str, Any]) -> Any:
    """Three steps, with Newton-Schulz in float64, so that no rounding is enlarged."""
    step.COMPUTE = torch.float64
    optimizer = muon(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3), *ROWS, **how)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator)
            p.grad = whole if not isinstance(p, DTensor) else shard_like(whole, p)
        optimizer.step()
    return optimizer


def shard_like(whole: torch.Tensor, p: DTensor) -> DTensor:
    return torch.distributed.tensor.distribute_tensor(whole, p.device_mesh, p.placements)


def process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    found = []
    for how in HOW:
        model = model_of()
        fully_shard(model, mesh=mesh)
        optimizer = steps(model, how)
        weights = [p.full_tensor().detach() for p in model.parameters()]
        momenta = [optimizer.state[p]["momentum_buffer"] for p in [*model.parameters()][2:]]
        found.append((weights, [x.to_local().shape for x in momenta]))
    torch.save(found, Path(folder) / f"{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_step_as_one_does(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step, "COMPUTE", step.COMPUTE)  # set back after `steps`
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}") for rank in (0, 1)]
    for i, how in enumerate(HOW):
        alone = model_of()
        steps(alone, how)
        for p, *sharded in zip(alone.parameters(), *(f[i][0] for f in found), strict=True):
            assert torch.equal(sharded[0], sharded[1])
            torch.testing.assert_close(p.detach(), sharded[0], rtol=0, atol=1e-6)
        assert found[0][i][1] == [(4, 5), (1, 8), (4096, 1)]
        assert found[1][i][1] == [(4, 5), (0, 8), (4096, 1)]
