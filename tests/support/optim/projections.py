"""A fused projection, what is made of its output, and the row that its trace gives."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import RoleRow

WIDTH, OUT, H, D = 8, 48, 4, 4  # 48 features: q, k and v of 4 heads of 4
COS, SIN = torch.linspace(0, 1, 5).cos()[:, None], torch.linspace(0, 1, 5).sin()[:, None]


class Made(nn.Module):
    """What a function makes of the output of a projection, and a matrix after it."""

    def __init__(self, make: Callable[..., Tensor], width: int, **parts: nn.Module) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(WIDTH, OUT), nn.Linear(width, 5)
        self.norm = nn.LayerNorm(5)
        self.make, self.parts = make, nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(self.make(self.fused(x), x, **self.parts)))


def row_of(model: nn.Module, name: str = "fused.weight", example: object = None) -> RoleRow:
    names, parameters = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, 5, WIDTH)
    found = classify(parameters, names, model, (x,) if example is None else example)
    return {row.name: row for row in found}[name]


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.view(*x.shape[:-1], n, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
