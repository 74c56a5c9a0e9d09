"""How large an update is: the root mean square that is asked for, and the one that is obtained.

    X = U / |U|_F                      a matrix [m, n], m <= n, with singular values x, sum x^2 = 1
    O = NewtonSchulz(X)                its singular values are p(x), p the composed polynomial
    RMS(O) sqrt(n) = sqrt(mean p(x)^2)

Moonlight's lemma 1 (arXiv 2502.16982, appendix A) takes all p(x) as 1, so that RMS(O) is
1/sqrt(max(m, n)). Coefficients made for speed leave p(x) anywhere from 0.7 to 1.2, so the factor
really obtained depends on them and on the spectrum. For a matrix of independent entries the
spectrum is known: m x^2 follows the law of Marchenko and Pastur with ratio m/n.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonfx.ops import newton_schulz as operator
from moonfx.optim.coefficients import composed
from moonfx.optim.matrices import pieces
from moonfx.optim.step.norms import normalized

if TYPE_CHECKING:
    from moonfx.optim.muon import Muon
    from moonfx.optim.roles.table import RoleRow
    from moonfx.optim.state.adamw import Source

# Within 1e-4 of 8192 points for every published set up to [4096, 4096]; about a millisecond.
_POINTS = 512


def correction(m: int, n: int, coefficients: Sequence[Any]) -> float:
    """RMS(O) sqrt(max(m, n)) of a Gaussian [m, n], by quadrature over its singular values.

    Args:
        coefficients: (a, b, c) of each step, or all of them one after another.
    """
    numbers: list[float] = []
    for x in coefficients:
        numbers += x if isinstance(x, Sequence) else [x]
    return _correction(min(m, n), max(m, n), tuple(numbers))


@functools.lru_cache(maxsize=4096)
def _correction(m: int, n: int, numbers: tuple[float, ...]) -> float:
    triples = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
    if m == 1:  # one singular value, which is the norm
        return abs(composed(triples, 1.0))
    # z = m x^2 = 1 + g + 2 sqrt(g) cos t has the density (2/pi) sin(t)^2 / z in t: smooth, so that
    # the midpoint rule converges fast, also where the law has its edge at zero (m = n).
    g, total = m / n, 0.0
    for i in range(_POINTS):
        t = (i + 0.5) * math.pi / _POINTS
        z = 1 + g + 2 * math.sqrt(g) * math.cos(t)
        # No singular value exceeds the norm; the law of large matrices does not know that at m = 2.
        y = composed(triples, min(1.0, math.sqrt(z / m)))
        total += math.sin(t) ** 2 / z * y * y
    return math.sqrt(2 / _POINTS * total)


def targets(rms: float | str, source: "Source", table: Sequence["RoleRow"]) -> list[float | None]:
    """The update RMS to ask for, of each parameter in the order of the groups; None on AdamW.

    Args:
        rms: a number; "betas", what AdamW's update has on gradients that are noise,
            sqrt((1 - beta1) / (1 + beta1)) (kexue.fm/archives/11267); or "measured", each
            parameter's own in the last step: RMS of m_hat / (sqrt(v_hat) + eps). What has no
            measure (no state yet, or a gradient of zeros) takes that of "betas".
        source: the AdamW.
        table: a row per parameter.
    """
    found: list[float | None] = []
    for row, (group, p) in zip(table, source.members(), strict=True):
        if row.optimizer != "muon":
            found.append(None)
        elif isinstance(rms, (int, float)):
            found.append(float(rms))
        else:
            measured = _measured(source, group, p) if rms == "measured" else 0.0
            found.append(measured or noise_rms(source.betas(group)[0]))
    return found


def noise_rms(beta1: float) -> float:
    """RMS of AdamW's update on independent gradients of mean zero, once its averages have settled.

    m_hat then has the variance (1 - b1)/(1 + b1) of one gradient, and v_hat its mean square.
    """
    return math.sqrt((1 - beta1) / (1 + beta1))


def _measured(source: "Source", group: dict[str, Any], p: Tensor) -> float:
    first, second = source.first_moment(p), source.second_moment(p)
    step = source.steps(p, group)
    if first is None or second is None or step < 1:
        return 0.0
    beta1, beta2 = source.betas(group)
    v = (whole(second).float() / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return root_mean_square(whole(first).float() / (1 - beta1**step) / v)


def root_mean_square(x: Tensor) -> float:
    return (torch.linalg.vector_norm(x.float()) / math.sqrt(max(1, x.numel()))).item()


def whole(x: Tensor) -> Tensor:
    """A tensor's floats, gathered if it is sharded and decoded if it is quantized."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x.dequantize() if hasattr(x, "codes") else x


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
def update_rms(opt: "Muon") -> UpdateRMS:
    """The RMS of each Muon parameter's next update, beside the one asked for.

    Computed now, from the momentum: a step stores nothing. A parameter that has a gradient counts
    with it, so between backward() and step() these are the very updates that step() will make;
    without one, the update is that of the momentum alone. Parameters without state are left out,
    unless they have a gradient.

    Raises:
        TypeError: if opt is not a moonfx.Muon.
    """
    if not hasattr(opt, "table") or not all("target_rms" in g for g in opt.param_groups):
        raise TypeError(f"opt must be a moonfx.Muon, got {type(opt).__name__}")
    rows: list[UpdateRow] = []
    named = iter(opt.table)
    for group in opt.param_groups:
        for p, target in zip(group["params"], group["target_rms"], strict=True):
            row = next(named)
            update = _next(opt, group, p) if target is not None else None
            if update is None:
                continue
            blocks = pieces(update, row.layout)
            for i, (view, shape) in enumerate(blocks):
                name = f"{row.name}[{i}]" if len(blocks) > 1 else row.name
                obtained = _obtained(view.reshape(shape), target, group)
                rows.append(UpdateRow(name, shape[1:], target, obtained))
    return UpdateRMS(rows)


def _next(opt: "Muon", group: dict[str, Any], p: Tensor) -> Tensor | None:
    """What Newton-Schulz will get of a parameter, float32; None if nothing."""
    buffer = opt.state.get(p, {}).get("momentum_buffer")
    if buffer is None and p.grad is None:
        return None
    dtype = p.dtype if buffer is None else buffer.dtype
    momentum = torch.zeros((), device=p.device) if buffer is None else whole(buffer).float()
    if p.grad is None:
        return momentum
    grad = whole(p.grad).to(dtype).float()
    if group.get("maximize", False):
        grad = -grad
    if group["decay"] == "coupled":
        grad = grad + float(group["weight_decay"]) * whole(p).float()
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
