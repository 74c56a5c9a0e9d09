"""A Muon as users write it, in a dtype of choice: torch.optim.Muon iterates in bfloat16 alone."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moonfx.kernels.reference.newton_schulz import JORDAN


class WrittenMuon(torch.optim.Optimizer):
    """torch.optim.Muon's rule with Newton-Schulz in `dtype`."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, steps: int, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})
        self.steps, self.dtype = steps, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    def orthogonal(self, update: Tensor) -> Tensor:
        a, b, c = JORDAN
        tall = update.shape[0] > update.shape[1]
        X = update.to(self.dtype)
        X = X.T if tall else X
        X = X / X.norm().clamp(min=1e-7)
        for _ in range(self.steps):
            A = X @ X.T
            X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X.T if tall else X
