"""A language model of five roles, small enough for hundreds of steps in a test."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH = 40, 64  # torchao quantizes from 4,096 numbers: hidden matrices have 8,192


class Net(nn.Module):
    """Embedding, norm, two hidden matrices, head: 9 parameters, 2 of them for Muon."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        return logits


ON_MUON = ["up.weight", "down.weight"]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(dtype)


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, step: int) -> Tensor:
    """Of predicting each token's successor modulo the vocabulary: there is something to learn."""
    x = tokens(step)
    return F.cross_entropy(model(x).float().flatten(0, 1), ((x + 1) % VOCABULARY).flatten())


def equal(a: Any, b: Any) -> bool:
    """Whether two entries of a state are equal bit for bit; torchao's classes by their parts."""
    if hasattr(a, "codes"):
        return hasattr(b, "codes") and equal(a.codes, b.codes) and equal(a.scale, b.scale)
    return torch.equal(a, b) and a.dtype is b.dtype if isinstance(a, Tensor) else bool(a == b)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The loss before each step."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        with torch.compiler.set_stance("force_eager"):  # torchao compiles each parameter's step
            optimizer.step()
        losses.append(value.item())
    return losses
