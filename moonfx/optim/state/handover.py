"""Moments become momentum, and momentum becomes moments.

An AdamW after t updates holds m = (1 - b1) sum b1^(t-i) g_i and v, the same of g^2 with b2. Muon's
buffer is an average too, so it takes over what m estimates, the mean gradient:

    forth   buf = m / (1 - b1^t)                        the step counter stays
    back    m = buf (1 - b1^t),  v = V (1 - b2^t)       V is an estimate: Muon keeps no v

With gradients of signal power s and noise power n, g^2 is s + n and the square of an average with
factor b is s + n a(b), where a(b, t) = (1 - b)/(1 + b) (1 + b^t)/(1 - b^t). The ratio R of the two
that AdamW's own states show at conversion gives n/s, and that gives the ratio to be expected of
Muon's average, which is kept as one number per parameter (`second_moment`). Going back,

    V = ratio * rows(buf^2) x columns(buf^2) / mean(buf^2)

the best rank-one guess of where the squares lie (as Adafactor keeps them), with a floor of 1 % of
their mean, so that a row that had no gradient lately does not jump at the next.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moonfx.optim.matrices import Layout, matrices_back, matrices_last
from moonfx.optim.sharding import is_sharded
from moonfx.optim.state.adamw import FIRST, SECOND, Group, is_low_bit, moment, steps_of
from moonfx.optim.state.floats import number
from moonfx.optim.state.low_bit import stored

State = dict[str, Any]

_FLOOR = 0.01


def momentum_of(state: State, group: Group) -> Tensor | None:
    """The mean gradient that an AdamW's state estimates, a new tensor, None without a state.

    Returns:
        exp_avg/(1 - beta1^t) in exp_avg's dtype (quantized states: float32).
    """
    first = moment(state, FIRST)
    if first is None:
        return None
    unbias = 1 - float(group["betas"][0]) ** steps_of(state, group)
    if unbias == 0:  # a state of which no update was taken
        return torch.zeros_like(first)
    return (first.float() / unbias).to(first.dtype)


def muon_state(p: Tensor, state: State, group: Group, low_bit: str | None) -> State:
    """The state with which Muon goes on where AdamW stopped.

    Args:
        p: the parameter.
        state: its AdamW state, with moments.
        group: its group, with betas.
        low_bit: the momentum's dtype, if not exp_avg's.
    Returns:
        "step", a float32 scalar where torch's AdamW has it, and "momentum_buffer".
    """
    momentum = momentum_of(state, group)
    assert momentum is not None
    if is_low_bit(state, FIRST):  # its codes stand for numbers of the parameter's dtype
        momentum = momentum.to(p.dtype)
    on_device = group.get("capturable") or group.get("fused")
    device = p.device if on_device else torch.device("cpu")
    return {
        "step": torch.tensor(steps_of(state, group), dtype=torch.float32, device=device),
        "momentum_buffer": stored(p, momentum, low_bit),
    }


def second_moment(state: State, group: Group, mu: float) -> float | None:
    """The ratio of mean g^2 to mean buf^2 that a parameter's Muon will show.

    Args:
        state, group: the parameter's AdamW state and its group.
        mu: the factor of Muon's average.
    Returns:
        None where there is no state, or only zeros.
    """
    first, second = moment(state, FIRST), moment(state, SECOND)
    steps = steps_of(state, group)
    if first is None or second is None or steps < 1:
        return None
    b1, b2 = (float(b) for b in group["betas"])
    m = number(first.float().square().mean()) / (1 - b1**steps) ** 2
    v = number(second.float().mean()) / (1 - b2**steps)
    return _ratio(v / m, b1, steps, mu) if m > 0 and v > 0 else None


def _ratio(observed: float, b1: float, steps: float, mu: float) -> float:
    """What the ratio `observed` with AdamW's average after `steps` becomes with Muon's."""
    stationary = noise_share(mu, math.inf)
    unexplained = 1 - noise_share(b1, steps) * observed
    if unexplained <= 0 or steps == 1:  # nothing but noise; one gradient says nothing
        return 1 / stationary
    noise = max(observed - 1, 0.0) / unexplained
    return (1 + noise) / (1 + stationary * noise)


def noise_share(b: float, steps: float) -> float:
    """Of independent noise, the power left in its bias-corrected average: 1 at the first step."""
    if b == 0:
        return 1.0
    tail = 0.0 if math.isinf(steps) else b**steps
    return (1 - b) / (1 + b) * (1 + tail) / (1 - tail)


def moments_of(
    momentum: Tensor, steps: float, group: Group, layout: Layout, mu: float, ratio: float | None
) -> tuple[Tensor, Tensor] | None:
    """exp_avg and exp_avg_sq for a parameter that comes back from Muon.

    Args:
        momentum: the buffer, float, the parameter's shape.
        steps: how many updates the parameter has had, AdamW's and Muon's.
        group: with betas.
        layout: where its matrices lie.
        mu: the factor of the average.
        ratio: its `second_moment`; None for a parameter that Muon started from zero: then the
            buffer still has that bias, and its gradients are taken for noise.
    Returns:
        Both in momentum's dtype; None if the momentum is zero: AdamW then starts afresh.
    """
    b1, b2 = (float(b) for b in group["betas"])
    mean = momentum.float()
    if ratio is None and steps >= 1:
        mean = mean / (1 - mu**steps) if mu else mean
        ratio = 1 / noise_share(mu, steps)
    if ratio is None or steps < 1 or number(mean.abs().amax()) == 0:
        return None
    square = ratio * _rank_one(mean.square(), layout)
    first, second = mean * (1 - b1**steps), square * (1 - b2**steps)
    if is_sharded(momentum):  # sums over rows and columns left it whole on each process
        second = second.redistribute(momentum.device_mesh, momentum.placements)
    return first.to(momentum.dtype), second.to(momentum.dtype)


def _rank_one(square: Tensor, layout: Layout) -> Tensor:
    """Row means times column means over the mean, of each matrix, with a floor."""
    matrices = matrices_last(square, layout)
    shape = matrices.shape
    if layout.kind == "flatten":
        matrices = square.flatten(1)
        matrices = matrices if layout.outer == 1 else matrices.unflatten(0, (layout.outer, -1))
    rows, columns = matrices.mean(-1, keepdim=True), matrices.mean(-2, keepdim=True)
    mean = matrices.mean((-2, -1), keepdim=True)
    # The quotient first: the product of two squares may be too small for a float.
    estimate = rows * (columns / mean.clamp(min=torch.finfo(mean.dtype).tiny))
    # An expert that had no gradient at all lately takes the others' size.
    floor = torch.where(mean > 0, mean, square.mean())
    estimate = estimate.lerp(floor.expand_as(estimate), _FLOOR).view(shape)
    return matrices_back(estimate, layout)
