"""Reads an AdamW, whoever wrote it: groups, betas, names, moments, steps.

    torch.optim         state: step (tensor), exp_avg, exp_avg_sq
    torchao.optim       the same, the moments as 8-bit, 4-bit or fp8 codes with a scale per block
    bitsandbytes-like   state: step (int), state1, state2, for 8 bits with qmap1, absmax1 per block
    Apex-like           state: exp_avg, exp_avg_sq; the step is the group's

Nothing else of moonfx.optim knows these differences.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from moonfx.optim.settings import is_muons
from moonfx.optim.state.floats import dequantized, has_codes

Group = dict[str, Any]

FIRST, SECOND = ("exp_avg", "state1"), ("exp_avg_sq", "state2")

# bitsandbytes keeps no block size beside its codes: one scale per so many values.
_BLOCKS = (256, 2048, 4096, 1024, 512, 128, 64)

_KEYS = ("lr", "betas", "eps", "weight_decay")
_WHAT_MAY_BE = (
    "torch.optim.AdamW or Adam, torchao.optim's AdamW8bit, AdamW4bit and AdamWFp8, or an optimizer "
    "that keeps the same things: groups with lr, betas, eps and weight_decay, states with exp_avg "
    "and exp_avg_sq (or state1 and state2)"
)

# Named like AdamW or with its states, but another update.
_OTHERS = {
    "AdEMAMix": "it has a third moment",
    "AdaBelief": "its second moment is of the gradient's surprise",
    "Adafactor": "it keeps no first moment",
    "Adamax": "its second moment is a maximum",
    "Adan": "it has a third moment",
    "LAMB": "it scales its update by the weight's norm, so its learning rate is not AdamW's",
    "Lamb": "it scales its update by the weight's norm, so its learning rate is not AdamW's",
    "LARS": "it scales its update by the weight's norm, so its learning rate is not AdamW's",
    "LBFGS": "it needs a closure and has no moments",
    "Lion": "it has no second moment and a learning rate of its own kind",
    "Muon": "it is a Muon already",
    "NAdam": "its first moment is weighted by a schedule",
    "Prodigy": "it finds its own learning rate",
    "RAdam": "its first steps are rectified",
    "SGD": "it has no second moment, and its learning rate is not one for updates of RMS 0.2",
    "SparseAdam": "its gradients are sparse, and Muon needs whole matrices",
}
_SCHEDULE_FREE = (
    "it steps averages of weights, which its train() and eval() exchange with the model's and only "
    "it can continue"
)


@dataclass(frozen=True, eq=False)
class Source:
    """An AdamW-like optimizer, read only.

    Args:
        optimizer: what was given.
    """

    optimizer: Optimizer

    @property
    def groups(self) -> list[Group]:
        groups: list[Group] = self.optimizer.param_groups
        return groups

    @property
    def word(self) -> str:
        """The class's name."""
        return type(self.optimizer).__name__

    def members(self) -> Iterator[tuple[Group, Tensor]]:
        """Each parameter with its group, in order."""
        for group in self.groups:
            for p in group["params"]:
                yield group, p

    def names(self) -> list[str]:
        """Each parameter's name as given with named_parameters(), "" where none was."""
        found: list[str] = []
        for group in self.groups:
            blank = [""] * len(group["params"])
            given = group.get("param_names")
            found += list(given) if given and len(given) == len(blank) else blank
        return found

    def places(self) -> list[str]:
        """Where each parameter is."""
        return [
            f"param_groups[{i}].params[{j}]"
            for i, group in enumerate(self.groups)
            for j in range(len(group["params"]))
        ]

    def state(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state, {} before its first step. Reading it adds none to the optimizer."""
        found: dict[str, Any] = self.optimizer.state.get(p) or {}
        return found

    def betas(self, group: Group) -> tuple[float, float]:
        first, second = group["betas"]
        return float(first), float(second)

    def coupled(self, group: Group) -> bool:
        """Whether weight decay joins the gradient (Adam) and not the weight (AdamW)."""
        for flag in ("is_adamw", "adam_w_mode"):  # torchao; Apex and DeepSpeed
            if hasattr(self.optimizer, flag):
                return not getattr(self.optimizer, flag)
        if "decoupled_weight_decay" in group:
            return not group["decoupled_weight_decay"]
        # bitsandbytes' Adam decays the weight, whatever its name.
        bitsandbytes = hasattr(self.optimizer, "optimizer_name")
        return not bitsandbytes and not self.is_named("adamw")

    def is_named(self, word: str) -> bool:
        """Whether the class, or one that it is made from, has the word in its name."""
        return any(word in kind.__name__.lower() for kind in type(self.optimizer).__mro__)

    def first_moment(self, p: Tensor) -> Tensor | None:
        """exp_avg as floats of p's shape, maybe the state itself; None before the first step."""
        return moment(self.state(p), FIRST)

    def second_moment(self, p: Tensor) -> Tensor | None:
        """exp_avg_sq as floats of p's shape, maybe the state itself; None before the first step."""
        return moment(self.state(p), SECOND)

    def steps(self, p: Tensor, group: Group) -> float:
        """How many updates p has had."""
        return steps_of(self.state(p), group)

    def low_bit(self) -> bool:
        """Whether some state is quantized, so that a float momentum would take more memory."""
        # Before the first step: torchao's class says so, or bitsandbytes' arguments.
        bits = getattr(getattr(self.optimizer, "args", None), "optim_bits", 32)
        fresh = hasattr(self.optimizer, "_subclass_zeros") or bits == 8
        return fresh or any(is_low_bit(self.state(p), FIRST) for _, p in self.members())


def moment(state: dict[str, Any], keys: tuple[str, str]) -> Tensor | None:
    """The first or second moment of one parameter's state as floats, None if there is none."""
    key = next((k for k in keys if isinstance(state.get(k), Tensor)), None)
    if key is None:
        return None
    value: Tensor = state[key]
    if value.dtype is torch.uint8:
        return _from_codes(value, state, key[-1])
    return dequantized(value)


def is_low_bit(state: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether a state keeps one of these as codes."""
    return any(
        isinstance(v := state.get(k), Tensor) and (v.dtype is torch.uint8 or has_codes(v))
        for k in keys
    )


def steps_of(state: dict[str, Any], group: Group) -> float:
    """The number of updates that a state has had. Waits for the device if the counter is there."""
    steps: Any = state.get("step", group.get("step", 0.0))
    return float(steps)


def _from_codes(codes: Tensor, state: dict[str, Any], number: str) -> Tensor:
    """bitsandbytes' bytes: an entry of a map, times the scale of the block or of the whole."""
    floats = state[f"qmap{number}"].float()[codes.long()]
    scales = state.get(f"absmax{number}")
    if scales is None:
        return floats * state[f"max{number}"]
    flat = floats.flatten()
    block = _block(flat.numel(), scales.numel())
    return (flat * scales.float().repeat_interleave(block)[: flat.numel()]).view_as(floats)


def quantize(value: Tensor, state: dict[str, Any], number: str) -> None:
    """Writes a moment into bitsandbytes' state: as floats, or as the nearest entries of its map."""
    key = f"state{number}"
    if state[key].dtype is not torch.uint8:
        state[key].copy_(value)
        return
    qmap, flat = state[f"qmap{number}"].float(), value.float().flatten()
    block = _block(flat.numel(), state[f"absmax{number}"].numel())
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    share = (blocks / scales.clamp(min=torch.finfo(flat.dtype).tiny)[:, None]).flatten()
    # The entries ascend: a value takes the one on its side of the middle between two.
    codes = torch.bucketize(share[: flat.numel()], (qmap[1:] + qmap[:-1]) / 2)
    state[key].copy_(codes.view_as(state[key]))
    state[f"absmax{number}"].copy_(scales)


def _block(values: int, scales: int) -> int:
    return next(b for b in _BLOCKS if -(-values // b) == scales)


def read_adamw(optimizer: object) -> Source:
    """Checks that an object is an AdamW of some kind.

    Raises:
        TypeError: if it is not an optimizer, a wrapper around one, or of another kind.
        ValueError: if it has no parameters, no betas, or a flag that Muon has no meaning for.
    """
    if isinstance(optimizer, type):
        raise TypeError(f"adamw must be an optimizer, got the class {optimizer.__name__} itself")
    _refuse_wrappers(optimizer)
    if not isinstance(optimizer, Optimizer):
        hint = ""
        if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            hint = "; it has one: give its .optimizer"
        raise TypeError(
            f"adamw must be a torch.optim.Optimizer, got {type(optimizer).__name__}{hint}"
        )
    source = Source(optimizer)
    if not any(True for _ in source.members()):
        raise ValueError(f"adamw has no parameters: {source.word}.param_groups is empty")
    reasons = [_OTHERS[x.__name__] for x in type(optimizer).__mro__ if x.__name__ in _OTHERS]
    if source.is_named("schedulefree"):
        reasons.insert(0, _SCHEDULE_FREE)
    if reasons:
        raise TypeError(
            f"adamw is of class {source.word}, which is not converted: {reasons[0]}; it may be "
            f"{_WHAT_MAY_BE}"
        )
    for i, group in enumerate(source.groups):
        _check_group(source, i, group)
    return source


def _has_moments(source: Source) -> bool:
    states = [source.state(p) for _, p in source.members()]
    return any(moment(s, FIRST) is not None and moment(s, SECOND) is not None for s in states)


def _refuse_wrappers(optimizer: object) -> None:
    """Wrappers hold the optimizer that must be converted, and go on stepping it."""
    for attribute in ("optimizer", "optim", "_optimizer", "base_optimizer"):
        # vars: a property of a wrapper may fail before training begins.
        inner = getattr(optimizer, "__dict__", {}).get(attribute)
        if not isinstance(inner, Optimizer) or hasattr(optimizer, "get_last_lr"):
            continue
        word = type(optimizer).__name__
        raise TypeError(
            f"adamw is of class {word}, a wrapper that would go on stepping its own "
            f"{type(inner).__name__}: convert before wrapping (accelerator.prepare and the like "
            f"take a moonfx.Muon), or set wrapper.{attribute} = "
            f"moonfx.convert_optimizer(wrapper.{attribute}, ...) where the wrapper allows it"
        )


def _check_group(source: Source, index: int, group: Group) -> None:
    where = f"param_groups[{index}] of adamw ({source.word})"
    if is_muons(group):
        raise ValueError(
            f"{where} belongs to a moonfx.Muon: adamw was converted already, and training goes on "
            "with what convert_optimizer returned, or goes back first (moonfx.to_adamw); or a "
            "Muon's state_dict was loaded into adamw: convert first, then load"
        )
    missing = [key for key in _KEYS if key not in group]
    if missing and not isinstance(source.optimizer, Adam):
        raise TypeError(f"{where} has no {' and no '.join(missing)}; adamw may be {_WHAT_MAY_BE}")
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}, which AdamW needs")
    if not source.is_named("adam") and not _has_moments(source):
        raise TypeError(
            f"adamw is of class {source.word}, and nothing says that its update is AdamW's: it has "
            f"no states yet; adamw may be {_WHAT_MAY_BE}"
        )
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{where}: betas must be two numbers, got {betas!r}")
    if not all(0 <= float(b) < 1 for b in betas):
        raise ValueError(f"{where}: betas must lie in [0, 1), got {betas!r}")
    if group.get("amsgrad"):
        raise ValueError(
            f"{where} has amsgrad=True, which divides by the largest second moment ever seen: "
            "Muon keeps no second moment, so nothing could bound its step in that way, and no way "
            "back could restore the maximum; train with amsgrad=False"
        )
    if group.get("differentiable"):
        raise ValueError(
            f"{where} has differentiable=True: Muon's step is not differentiated through; "
            "set it to False"
        )
