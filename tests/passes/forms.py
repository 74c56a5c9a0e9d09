"""Attention written by hand: what the tests of the passes compile, and what became of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moonfx
from moonfx.report import Report

B, H, N, D = 2, 4, 24, 8
SCALE = D**-0.5
NEG = torch.finfo(torch.float32).min


class Model(nn.Module):
    """Runs `body(self, *inputs)`; keyword arguments become buffers."""

    def __init__(self, body: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def inputs(
    b: int = B, h: int = H, n: int = N, d: int = D, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [b, h, n, d], the same on every call."""
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(b, h, n, d, generator=generator).to(dtype)  # noqa: E731
    return make(), make(), make()


def causal(n: int = N, k: int | None = None) -> Tensor:
    """bool [n, k], True where query i may see key j; the last query sees the last key."""
    k = n if k is None else k
    return torch.arange(k)[None, :] <= torch.arange(n)[:, None] + (k - n)


def run(model: nn.Module, *given: Any, block: int = N, topk: int = 1) -> tuple[Any, Report]:
    """The output of the model made sparse, and the report; sinks 0, eager."""
    moonfx.sparsify(model, block, topk, sinks=0, compiler="eager", on_miss="ignore")
    try:
        out = model(*given)
        report = moonfx.report(model)
    finally:
        moonfx.restore(model)
        torch.compiler.reset()
    assert report.failures == []
    return out, report


def outcome(report: Report) -> list[str]:
    """Each site's mask class if it became sparse, or why it did not, without the node."""
    return [r.mask if r.action == "sparse" else r.reason.split(" (node")[0] for r in report.rows]
