"""How large an update is: the root mean square that is asked for, and the one that is obtained."""

import math
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from moonfx.ops import newton_schulz as operator
from moonfx.optim.matrices import pieces
from moonfx.optim.muon import Muon
from moonfx.optim.state.floats import gathered
from moonfx.optim.step.gaussian_rms import correction
from moonfx.optim.step.norms import normalized, root_mean_square


class UpdateRow(NamedTuple):
    """One matrix, or the equal ones of a batch of experts.

    Attributes:
        name: the parameter, with [i] for block i of a fused one.
        shape: (m, n) of the matrix.
        asked, obtained: RMS of the update at learning rate 1.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    obtained: float

    @property
    def ratio(self) -> float:
        return self.obtained / self.asked


class UpdateRMS(NamedTuple):
    """Asked and obtained update RMS, one row per matrix; str() is a table."""

    rows: list[UpdateRow]

    def __str__(self) -> str:
        lines = [
            (r.name, " x ".join(map(str, r.shape)), r.asked, r.obtained, r.ratio) for r in self.rows
        ]
        headers = ["parameter", "matrix", "asked", "obtained", "ratio"]
        text = tabulate(lines, headers, floatfmt=("", "", ".4f", ".4f", ".3f"))
        if not self.rows:
            return f"{text}\nno parameter has a momentum yet"
        ratios = [r.ratio for r in self.rows]
        return f"{text}\nobtained / asked: {min(ratios):.3f} to {max(ratios):.3f}"


@torch.no_grad()
def update_rms(opt: Muon) -> UpdateRMS:
    """The RMS of each Muon parameter's next update, beside the one asked for.

    Computed now, from the momentum: a step stores nothing. A parameter that has a gradient counts
    with it, so between backward() and step() these are the very updates that step() will make;
    without one, the update is that of the momentum alone. Parameters without state are left out,
    unless they have a gradient.

    Raises:
        TypeError: if opt is not a moonfx.Muon.
    """
    if not isinstance(opt, Muon) or opt.spent:
        raise TypeError(f"opt must be a moonfx.Muon, got {type(opt).__name__}")
    rows: list[UpdateRow] = []
    rest = iter(opt.table)
    for group in opt.param_groups:
        for p in group["params"]:
            row, target = next(rest), opt.facts[p].target_rms
            update = None if target is None else _next(opt, group, p)
            if target is None or update is None:
                continue
            blocks = pieces(update, row.layout)
            for i, (view, shape) in enumerate(blocks):
                name = f"{row.name}[{i}]" if len(blocks) > 1 else row.name
                obtained = _obtained(view.reshape(shape), target, group)
                rows.append(UpdateRow(name, shape[1:], target, obtained))
    return UpdateRMS(rows)


def _next(opt: Muon, group: dict[str, Any], p: Tensor) -> Tensor | None:
    """What Newton-Schulz will get of a parameter, float32; None if nothing."""
    buffer = opt.state.get(p, {}).get("momentum_buffer")
    if buffer is None and p.grad is None:
        return None
    dtype = p.dtype if buffer is None else buffer.dtype
    momentum = torch.zeros((), device=p.device) if buffer is None else gathered(buffer).float()
    if p.grad is None:
        return momentum
    grad = gathered(p.grad).to(dtype).float()
    if group.get("maximize", False):
        grad = -grad
    if group["decay"] == "coupled":
        grad = grad + float(group["weight_decay"]) * gathered(p).float()
    mu = group["momentum"]
    momentum = mu * momentum + (1 - mu) * grad
    return mu * momentum + (1 - mu) * grad if group["nesterov"] else momentum


def _obtained(stack: Tensor, target: float, group: dict[str, Any]) -> float:
    """RMS of the scaled update of matrices [b, m, n]."""
    x = normalized(stack).bfloat16()
    numbers = [c for triple in group["coefficients"] for c in triple]
    update = operator.newton_schulz(x, numbers).float()
    _, m, n = stack.shape
    if group["exact_rms"]:
        own = torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True) / math.sqrt(m * n)
        return root_mean_square(target * (update / own.clamp_min(1e-12)))
    law = math.sqrt(max(m, n)) / correction(m, n, group["coefficients"])
    return root_mean_square(target * law * update)
