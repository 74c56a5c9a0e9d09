"""AdamW in other people's forms, in few lines each: what their states and groups look like."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

BLOCK = 256


def code_map(signed: bool) -> Tensor:
    """256 sorted values in [-1, 1] or [0, 1], denser near zero, as 8-bit optimizers have it."""
    magnitudes = torch.logspace(-6, 0, 127 if signed else 255)
    signs = (-magnitudes.flip(0), magnitudes) if signed else (magnitudes,)
    values = torch.cat([*signs, torch.zeros(1)]).sort().values
    return torch.cat([values, torch.ones(256 - values.numel())])


def to_codes(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entries of the map, per block of BLOCK values, and each block's scale."""
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(1)
    share = flat / absmax.clamp(min=1e-30)[:, None]
    codes = (share[..., None] - qmap).abs().argmin(-1).to(torch.uint8)
    return codes.flatten()[: values.numel()].view_as(values), absmax


class BitsandbytesAdamW(torch.optim.Optimizer):
    """Like bitsandbytes' AdamW: states state1 and state2, the step an int, wd on the weight.

    bits=8 keeps both as codes with a map and one scale per block.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 1e-2, bits: int = 32
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        )
        self.optimizer_name, self.bits = "adam", bits
        self.args = SimpleNamespace(optim_bits=bits)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, self.state[p])

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        state = self.state[p]
        state["step"] = 0
        for i, signed in ((1, True), (2, False)):
            state[f"state{i}"] = torch.zeros_like(p, dtype=torch.float32)
            if self.bits == 8:
                state[f"qmap{i}"] = code_map(signed)
                self._write(state, i, state[f"state{i}"])

    def _update(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        if not state:
            self.init_state(group, p, 0, 0)
        assert p.grad is not None
        state["step"] += 1
        m, v = self._read(state, 1), self._read(state, 2)
        (b1, b2), t = group["betas"], state["step"]
        m = m.lerp(p.grad.float(), 1 - b1)
        v = v.lerp(p.grad.float().square(), 1 - b2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))
        self._write(state, 1, m)
        self._write(state, 2, v)

    def _read(self, state: dict[str, Any], i: int) -> Tensor:
        value: Tensor = state[f"state{i}"]
        if self.bits == 32:
            return value
        flat = state[f"qmap{i}"][value.long()].flatten()
        scales = state[f"absmax{i}"].repeat_interleave(BLOCK)[: flat.numel()]
        return (flat * scales).view_as(value)

    def _write(self, state: dict[str, Any], i: int, value: Tensor) -> None:
        if self.bits == 8:
            state[f"state{i}"], state[f"absmax{i}"] = to_codes(value, state[f"qmap{i}"])
        else:
            state[f"state{i}"] = value


class FusedAdam(torch.optim.Optimizer):
    """Like Apex' FusedAdam: the step is the group's, adam_w_mode says where the decay goes."""

    def __init__(self, params: Any, lr: float = 1e-3, adam_w_mode: bool = True) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        super().__init__(params, {**defaults, "bias_correction": True})
        self.adam_w_mode = 1 if adam_w_mode else 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t, lr = group["betas"], group["step"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                size = (state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"]
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * state["exp_avg"] / (1 - b1**t) / size)


def stepped(
    optimizer: torch.optim.Optimizer, steps: int, signal: float = 0.3, seed: int = 1
) -> torch.optim.Optimizer:
    """The optimizer after steps on gradients signal * S + N(0, 1), S fixed per parameter."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(parameters_of(optimizer))
    fixed = [torch.randn(p.shape, generator=generator) for p in parameters]
    for _ in range(steps):
        for p, s in zip(parameters, fixed, strict=True):
            p.grad = (signal * s + torch.randn(p.shape, generator=generator)).to(p.dtype)
        with torch.compiler.set_stance("force_eager"):  # torchao compiles each parameter's step
            optimizer.step()
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


class SAM(Optimizer):
    """As sharpness-aware minimization is spread: it makes its base, and shares its groups."""

    def __init__(self, params: Any, base: Any, **how: Any) -> None:
        super().__init__(params, {"rho": 0.05, **how})
        self.base_optimizer = base(self.param_groups, **how)
        self.param_groups = self.base_optimizer.param_groups
