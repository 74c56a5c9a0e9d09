"""Which tensors are sharded over processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moonfx.optim.sharding import is_sharded


def test_a_tensor_of_one_process_is_not_sharded() -> None:
    assert not is_sharded(torch.zeros(3))
    assert not is_sharded(nn.Parameter(torch.zeros(3)))
    assert not is_sharded(torch.zeros(3, device="meta"))


def test_a_tensor_of_several_processes_is_sharded_however_it_is_placed(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            value = distribute_tensor(torch.zeros(4, 2), mesh, [placement])
            assert is_sharded(value)
            assert is_sharded(nn.Parameter(value))
            assert not is_sharded(value.to_local())
    finally:
        dist.destroy_process_group()
