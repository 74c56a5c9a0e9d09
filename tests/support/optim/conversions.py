"""What an optimizer holds, compared; one matrix and its updates; cases for convert_optimizer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import moonfx
from tests.support.optim.nets import net, train


def snapshot(optimizer: Optimizer) -> Any:
    """All that an optimizer holds, with the keys in order and which objects they are."""
    groups = [
        (
            id(g),
            [id(p) for p in g["params"]],
            [(k, copy.deepcopy(v)) for k, v in g.items() if k != "params"],
        )
        for g in optimizer.param_groups
    ]
    states = [
        (id(p), [(k, id(v), v.clone() if isinstance(v, Tensor) else v) for k, v in s.items()])
        for p, s in optimizer.state.items()
    ]
    return groups, states, sorted(vars(optimizer))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def moved(parameter: nn.Parameter, optimizer: Optimizer, grad: Tensor) -> Tensor:
    """How far one step moves a parameter."""
    before = parameter.detach().clone()
    parameter.grad = grad.clone()
    optimizer.step()
    return parameter.detach() - before


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


def signal_and_noise(count: int, signal: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(64, 64, generator=generator)
    return [signal * fixed + torch.randn(64, 64, generator=generator) for _ in range(count)]


class Matrix:
    """One hidden matrix, 64 x 64 of zeros, with an AdamW and a model around it."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.ModuleDict(
            {"hidden": nn.Linear(64, 64, bias=False), "norm": nn.RMSNorm(64)}
        )
        self.weight = self.model["hidden"].weight
        nn.init.zeros_(self.weight)
        self.adamw = AdamW([self.weight], lr=1e-3, weight_decay=0.0, **options)

    def converted(self, **options: Any) -> moonfx.Muon:
        roles = {"hidden.weight": "muon"}
        return moonfx.convert_optimizer(self.adamw, self.model, roles=roles, **options)


Case = tuple[Any, dict[str, Any]]


def case(taken: int = 1, **options: Any) -> Case:
    """An AdamW over a Net after some steps, and convert_optimizer's other arguments."""
    model = net()
    adamw = AdamW(model.parameters())
    train(model, adamw, range(taken))
    return adamw, {"model": model, **options}
