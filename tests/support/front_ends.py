"""One small language model, its attention in three forms, and as an exported program."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import moonfx
from moonfx.report.report import Report

WIDTH, HEADS, WORDS, N = 32, 4, 50, 72
EAGER = {"compiler": "eager"}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_matmul(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """nanoGPT's: masked_fill, softmax."""
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(WIDTH // HEADS))
    causal = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = scores.masked_fill(causal.logical_not(), float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1, False) @ v


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Llama's: a mask of causality and padding, fewer key heads than query heads."""
    square = (q[..., :1] * 0 + k[..., :1].mean(1, keepdim=True).transpose(-2, -1)) * 0 == 0
    keep = square.tril() & (padding[:, None, None, :] != 0)
    k, v = (x[:, : HEADS // 2] for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (WIDTH // HEADS) ** 0.5
    causal = torch.ones_like(scores).tril()
    scores = torch.where(causal == 0, torch.finfo(torch.float32).min, scores)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for y in (q, k, v))
        return self.out(self.attend(q, k, v, padding).transpose(1, 2).flatten(2))


class LM(nn.Module):
    def __init__(self, attend: Attend, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Attention(attend) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x), padding)
        return self.head(x)


def model_of(attend: Attend, layers: int = 2) -> LM:
    torch.manual_seed(0)
    return LM(attend, layers).eval()


def inputs(length: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (2, length), generator=generator)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    return ids, padding


def exported(attend: Attend, layers: int = 2, **options: bool) -> ExportedProgram:
    n = Dim("n", min=8, max=512)
    shapes = {"ids": {1: n}, "padding": {1: n}}
    return export(model_of(attend, layers), inputs(), dynamic_shapes=shapes, **options)


def by_module(attend: Attend) -> tuple[Tensor, Report]:
    model = moonfx.sparsify(model_of(attend), 8, 3, **EAGER)
    return model(*inputs()), moonfx.report(model)
