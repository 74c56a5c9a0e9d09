"""A sharded model is seen whole inside, and is as it was after."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moonfx.capture.unsharded import unsharded


@pytest.fixture
def sharded() -> Iterator[Any]:
    """A model of a tied weight in four processes, as far as this one can tell."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        pytest.skip("a process group is there already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    yield model
    dist.destroy_process_group()


def test_parameters_are_whole_and_plain_and_the_users_hooks_stay(sharded) -> None:
    calls: list[nn.Module] = []
    sharded.register_forward_pre_hook(lambda module, args: calls.append(module))
    shards = dict(sharded.named_parameters())
    with unsharded(sharded) as meant:
        inside = dict(sharded.named_parameters())
        assert {name: type(p) for name, p in inside.items()} == dict.fromkeys(shards, nn.Parameter)
        assert {name: p.shape for name, p in inside.items()} == {
            name: p.shape for name, p in shards.items()
        }
        assert {name: meant[id(p)] for name, p in inside.items()} == shards
        assert sharded[0].weight is sharded[1].weight
        assert sum(p.untyped_storage().nbytes() for p in inside.values()) == 4 * len(inside)
        sharded(torch.tensor([1, 2]))
    assert calls == [sharded]


def test_all_is_put_back_also_after_an_error(sharded) -> None:
    def things() -> list[Any]:
        hooks = [[*m._forward_pre_hooks, *m._forward_hooks] for m in sharded.modules()]
        return [*map(id, sharded.parameters()), hooks]

    before = things()

    def fails() -> None:
        with unsharded(sharded):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert things() == before


def test_a_whole_model_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with unsharded(model) as meant:
        assert model.weight is weight
        assert meant == {}
