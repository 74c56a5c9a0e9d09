"""Roles by use of a model that is sharded are those of the model that it was."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.optim import AdamW

import moonfx

IDS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.out = nn.Linear(16, 16, bias=False)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in qkv)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


class LM(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)
        self.register_buffer("scale", torch.ones(16))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module", autouse=True)
def four_processes() -> Iterator[None]:
    """Four, as far as this one can tell: what would be sent is not."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        pytest.skip("a process group is there already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def by_layers(model: Any) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def as_one(model: Any) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def in_bfloat16(model: Any) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    fully_shard(model, mesh=mesh, mp_policy=policy)


def by_tensors(model: Any, mesh: Any = None) -> None:
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(2):
        plan[f"layers.{i}.norm"] = SequenceParallel()
        plan |= {f"layers.{i}.{name}": ColwiseParallel() for name in ("qkv", "up")}
        plan |= {f"layers.{i}.{name}": RowwiseParallel() for name in ("out", "down")}
    parallelize_module(model, mesh or init_device_mesh("cpu", (4,)), plan)


def by_both(model: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensors"))
    by_tensors(model, mesh["tensors"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def frozen(model: Any) -> None:
    model.layers[0].requires_grad_(False)
    as_one(model)


SHARDED: list[tuple[str, Callable[[Any], None], bool]] = [
    ("fully_shard, by layers", by_layers, False),
    ("fully_shard, as one", as_one, False),
    ("fully_shard, tied", as_one, True),
    ("fully_shard, in bfloat16, replicated", in_bfloat16, False),
    ("fully_shard, a part frozen", frozen, False),
    ("tensor parallel", by_tensors, False),
    ("tensor parallel and fully_shard", by_both, False),
]


def roles(model: nn.Module) -> list[tuple[Any, ...]]:
    muon = moonfx.convert_optimizer(AdamW(model.parameters()), model, example=(IDS,))
    rows = moonfx.roles(muon)
    return [(r.name, r.shape, r.role, r.rule, r.optimizer, r.layout) for r in rows]


def seen(model: nn.Module) -> list[Any]:
    """The parameters, buffers and hooks of a model, each itself."""
    hooks = [list(x._forward_pre_hooks) + list(x._forward_hooks) for x in model.modules()]
    return [*map(id, [*model.parameters(), *model.buffers()]), hooks]


@pytest.mark.parametrize(("shard", "tied"), [x[1:] for x in SHARDED], ids=[x[0] for x in SHARDED])
def test_roles_of_a_sharded_model_are_those_of_the_whole_one(shard, tied) -> None:
    model = LM(tied)
    shard(model)
    before = seen(model)
    found = roles(model)
    assert found == roles(LM(tied))
    assert seen(model) == before
    layouts = {name: layout.sizes for name, _, _, _, _, layout in found}
    assert layouts["layers.1.qkv.weight"] == (16, 16, 16)
    assert layouts["layers.1.up.weight"] == (32, 32)


class ByHand(LM):
    """Its heads are divided by hand, so that the whole projection has too many for it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits: Tensor = self.head(x + self.layers[0].qkv(x).view(*ids.shape, 12).mean())
        return logits


def test_what_does_not_fit_the_whole_model_is_said_and_all_is_put_back() -> None:
    model = ByHand()
    by_tensors(model)
    before = seen(model)
    with pytest.raises(
        ValueError, match="(?s)ByHand cannot be traced .* sizes were divided by hand"
    ):
        roles(model)
    assert seen(model) == before
