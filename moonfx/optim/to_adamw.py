"""to_adamw: a converted optimizer becomes what it was, and training goes on."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moonfx.capture.optimizers import count_as_stepped, replace_step, share_hooks
from moonfx.optim.muon import Muon
from moonfx.optim.settings import GROUP_KEYS
from moonfx.optim.state.adamw import Group, is_low_bit, quantize
from moonfx.optim.state.floats import dequantized, is_finite
from moonfx.optim.state.handover import State, moments_of

Moments = tuple[Tensor, Tensor]


def to_adamw(optimizer: Muon) -> Optimizer:
    """The way back from convert_optimizer.

    Before the Muon's first step nothing was given up, and the optimizer that was converted comes
    back itself. After it, a new one of its class does, in the same groups (the same dicts, without
    Muon's keys; schedulers go on), with the state of what had stayed on AdamW as it is. For what
    was on Muon, exp_avg is the momentum, the step counter goes on, and exp_avg_sq is an estimate,
    for Muon keeps no second moment: its size is the one that the gradients' noise made likely at
    conversion, and the momentum's squares say where in a matrix it is large
    (state/handover.py). So no update jumps; AdamW's own averages replace the estimate within about
    1/(1 - beta2) steps. A parameter without momentum starts afresh.

    The Muon is spent: its step raises.

    Args:
        optimizer: of moonfx.convert_optimizer.

    Returns:
        An optimizer of the class that was converted; torchao's and bitsandbytes' states are
        quantized again.

    Raises:
        TypeError: if optimizer is not a moonfx.Muon.
        ValueError: if a momentum holds NaN or infinity, or the optimizer has gone back already.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(f"optimizer must be a moonfx.Muon, got {type(optimizer).__name__}")
    if optimizer.spent:
        raise ValueError("this moonfx.Muon has gone back to AdamW already")
    source = optimizer.source
    if source is None:
        moments = _moments(optimizer)
        source = optimizer.rest.optimizer(optimizer.param_groups, {})
        source.param_groups = optimizer.param_groups
        source.state = type(optimizer.state)(dict, _adamw_states(optimizer, source, moments))
        share_hooks(optimizer, source)
    for group in source.param_groups:
        for key in GROUP_KEYS:
            group.pop(key, None)
    optimizer.source, optimizer.spent = None, True
    optimizer.state.clear()
    count_as_stepped(optimizer)
    replace_step(optimizer, _refuse)
    return source


@torch.no_grad()
def _moments(optimizer: Muon) -> dict[Tensor, Moments | None]:
    """Both moments of each parameter that is on Muon and has a state."""
    found: dict[Tensor, Moments | None] = {}
    rows = iter(optimizer.table)
    for group in optimizer.param_groups:
        for p in group["params"]:
            row, state = next(rows), optimizer.state.get(p)
            if not optimizer.on_muon(p) or not state:
                continue
            buffer = state["momentum_buffer"]
            momentum = dequantized(buffer)
            if is_low_bit(state, ("momentum_buffer",)):
                momentum = momentum.to(p.dtype)
            if not is_finite(momentum):
                raise ValueError(
                    f"the momentum of {row.name} holds NaN or infinity: AdamW cannot go on from it"
                )
            mu, ratio = group["momentum"], optimizer.facts[p].second_moment
            found[p] = moments_of(momentum, float(state["step"]), group, row.layout, mu, ratio)
    return found


@torch.no_grad()
def _adamw_states(
    optimizer: Muon, made: Optimizer, moments: dict[Tensor, Moments | None]
) -> dict[Tensor, State]:
    states: dict[Tensor, State] = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            state = optimizer.state.get(p)
            if state and p in moments:
                pair = moments[p]
                state = pair and _state(made, (group, p, i, j), state["step"], pair)
            if state:
                states[p] = state
    return states


def _state(
    made: Optimizer, place: tuple[Group, Tensor, int, int], step: Tensor, moments: Moments
) -> State:
    """The moments in the form that the optimizer's class keeps them in."""
    group, p, *_ = place
    if hasattr(made, "init_state"):  # bitsandbytes
        state: Any = made.state.setdefault(p, {})
        made.init_state(*place)
        state["step"] = int(step)
        for number, value in zip("12", moments, strict=True):
            quantize(value, state, number)
        return dict(state)
    if hasattr(made, "_new_buffer"):  # torchao
        buffers = [made._new_buffer(p, signed) for signed in (True, False)]
        for buffer, value in zip(buffers, moments, strict=True):
            buffer.copy_(value)
        moments = (buffers[0], buffers[1])
    state = {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
    return state if "step" in group else {"step": step, **state}  # Apex counts in its groups


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "this moonfx.Muon went back to AdamW: call step() of what moonfx.to_adamw returned"
    )
