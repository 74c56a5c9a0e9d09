"""Loads a state_dict into a converted optimizer: its own kind, or an AdamW's.

torch's own load casts every state to its parameter's dtype, takes AdamW's moments for whatever the
optimizer calls its own, and replaces the groups by new dicts. Here the momentum and the steps keep
the dtype that they were saved in, an AdamW's states are converted as at the conversion itself, the
groups stay the dicts that schedulers hold; what does not fit is refused before anything changes.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from moonfx.optim import facts
from moonfx.optim.facts import Fact
from moonfx.optim.matrices import shapes
from moonfx.optim.settings import ADAMW, FOLLOWED, GROUP_KEYS, MUON, Settings, is_muons
from moonfx.optim.state.adamw import FIRST, Group, moment, steps_of
from moonfx.optim.state.handover import State, muon_state, second_moment

StateDict = dict[str, Any]


class StepsAdamW(Protocol):
    """What steps the parameters that stayed on AdamW, as the class `kind` does."""

    kind: type[Optimizer]


class Converted(Protocol):
    """As much of a moonfx.Muon as a checkpoint needs."""

    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    settings: Settings
    facts: dict[Tensor, Fact]

    @property
    def rest(self) -> StepsAdamW: ...
    def on_muon(self, p: Tensor) -> bool: ...
    def retire_source(self) -> None: ...


BUFFER = "momentum_buffer"
_ADVICE = (
    "; give the optimizer that is loaded into the same model, groups and roles=, or use "
    "torch.distributed.checkpoint, which goes by names"
)


class Loaded(NamedTuple):
    """What a state_dict makes of an optimizer."""

    groups: list[Group]
    states: dict[Tensor, State]
    facts: dict[Tensor, Fact]


def load(optimizer: Converted, state_dict: StateDict) -> None:
    """What load_state_dict of a moonfx.Muon does, but for its hooks.

    Args:
        optimizer: the Muon.
        state_dict: of a moonfx.Muon over the same parameters, or of the AdamW that it could have
            been converted from: then it is converted, with a warning that says so.

    Raises:
        TypeError: if state_dict is no state_dict of an optimizer.
        ValueError: if it is of another optimizer or of other parameters, naming the first.
    """
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise TypeError(
            "state_dict must be an optimizer's, with 'state' and 'param_groups', got "
            f"{', '.join(map(str, state_dict)) or 'none'}"
        )
    _check_sizes(optimizer, state_dict["param_groups"])
    saved = _with_settings(state_dict["param_groups"])
    own = [is_muons(group) for group in saved]
    if all(own):
        found = _own(optimizer, saved, state_dict["state"])
    elif not any(own):
        found = _adamws(optimizer, saved, state_dict["state"])
    else:
        raise ValueError("state_dict has groups of a moonfx.Muon beside groups that are none")
    optimizer.retire_source()  # the state that it kept for the way back is not the one loaded
    for group, new in zip(optimizer.param_groups, found.groups, strict=True):
        _replace(group, new)
    optimizer.facts.update(found.facts)
    optimizer.state = defaultdict(dict, found.states)


def _check_sizes(optimizer: Converted, saved: list[Group]) -> None:
    here = optimizer.param_groups
    if len(saved) != len(here):
        raise ValueError(f"state_dict has {len(saved)} groups, the optimizer {len(here)}{_ADVICE}")
    for i, (group, new) in enumerate(zip(here, saved, strict=True)):
        names = [optimizer.facts[p].row.name for p in group["params"]]
        if len(names) != len(new["params"]):
            raise ValueError(
                f"state_dict has {len(new['params'])} parameters in group {i}, the optimizer "
                f"{len(names)} ({', '.join(names[:3]) or 'none'}, ...){_ADVICE}"
            )


def _with_settings(saved: list[Group]) -> list[Group]:
    """The groups, each with its settings.

    Where a group was saved that is several here, torch.distributed.checkpoint gives its settings to
    the last of them alone; those of the only group are known.

    Raises:
        ValueError: if it is not known whose settings a group had.
    """
    bare = [i for i, group in enumerate(saved) if group.keys() <= {"params"}]
    if not bare:
        return saved
    whole = [group for group in saved if group.keys() > {"params"}]
    if len(whole) != 1:
        raise ValueError(
            f"state_dict has no settings of group {bare[0]}: one that was saved is several here, "
            "and torch.distributed.checkpoint gave its settings to the last; use "
            "StateDictOptions(flatten_optimizer_state_dict=True), or the groups that were saved"
        )
    return [{**whole[0], "params": group["params"]} for group in saved]


Member = tuple[Tensor, State, Group]


def _members(
    optimizer: Converted, saved: list[Group], states: Mapping[Any, State]
) -> Iterator[Member]:
    """Each parameter with its saved state and saved group."""
    for group, new in zip(optimizer.param_groups, saved, strict=True):
        for p, key in zip(group["params"], new["params"], strict=True):
            yield p, _flat(states.get(key) or {}), new


def _flat(state: Mapping[str, Any]) -> State:
    """A state without the nested dict in which bitsandbytes saves what is quantized."""
    flat: State = {}
    for key, value in state.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def _own(optimizer: Converted, saved: list[Group], states: Mapping[Any, State]) -> Loaded:
    """What a Muon's state_dict is."""
    found = Loaded(saved, {}, {})
    codes = {facts.name_code(fact.row.name): fact.row.name for fact in optimizer.facts.values()}
    for p, state, group in _members(optimizer, saved, states):
        if not state:
            continue
        name, kind = optimizer.facts[p].row.name, MUON if optimizer.on_muon(p) else ADAMW
        there = MUON if BUFFER in state or facts.KEYS[0] in state else ADAMW
        if there != kind:
            raise ValueError(
                f"{name} is on {kind!r} here and on {there!r} in state_dict: convert with the "
                "same model, example and roles= as when it was saved"
            )
        if kind == MUON:
            _check_facts(name, p, state, codes)
            found.facts[p] = facts.loaded(optimizer.facts[p], state)
        if kind == ADAMW or BUFFER in state:  # else it had had no gradient
            _check_shape(name, p, state, (BUFFER,) if kind == MUON else FIRST)
            found.states[p] = _placed(optimizer, p, state, group, kind)
    return found


def _check_facts(name: str, p: Tensor, state: State, codes: Mapping[int, str]) -> None:
    """That a Muon parameter's state has its facts, and that they are this parameter's."""
    missing = [key for key in facts.KEYS if key not in state]
    if missing:
        raise ValueError(
            f"state_dict holds {', '.join(map(str, state))} of {name}, and no "
            f"{' and no '.join(missing)}: it is of another Muon than moonfx's"
        )
    code, own = int(state[facts.KEYS[0]]), facts.name_code(name)
    if code and own and code != own and code in codes:
        raise ValueError(
            f"state_dict holds {codes[code]} where the optimizer has {name}"
            f": its parameters were in another order{_ADVICE}"
        )
    try:
        shapes(tuple(p.shape), facts.layout_of(state["layout"]))
    except ValueError as error:
        raise ValueError(f"state_dict holds a layout of {name} that cannot be: {error}") from None


def _adamws(optimizer: Converted, saved: list[Group], states: Mapping[Any, State]) -> Loaded:
    """What an AdamW's state_dict becomes."""
    groups = [
        {**new, **{key: group[key] for key in GROUP_KEYS}, FOLLOWED: new.get("betas", (0.0,))[0]}
        for group, new in zip(optimizer.param_groups, saved, strict=True)
    ]
    found, kept = Loaded(groups, {}, {}), 0
    for p, state, new in _members(optimizer, saved, states):
        if not state:
            continue
        fact = optimizer.facts[p]
        if moment(state, FIRST) is None:
            raise ValueError(
                f"state_dict holds {', '.join(map(str, state))} of {fact.row.name}, which is "
                "neither a moonfx.Muon's nor an AdamW's state"
            )
        _check_shape(fact.row.name, p, state, FIRST)
        if optimizer.on_muon(p):
            ratio = second_moment(state, new, optimizer.settings.momentum)
            fact = fact._replace(second_moment=ratio)
            made = muon_state(p, state, new, optimizer.settings.momentum_dtype)
            found.facts[p], found.states[p] = fact, {**made, **facts.saved(fact)}
        else:
            found.states[p], kept = _placed(optimizer, p, state, new, ADAMW), kept + 1
    warnings.warn(
        "moonfx: an AdamW state_dict was loaded into a moonfx.Muon: the first moments of "
        f"{len(found.facts)} parameters became their momentum and their second moments were "
        f"dropped; {kept} stay AdamW's as they are",
        stacklevel=4,
    )
    return found


def _check_shape(name: str, p: Tensor, state: State, keys: tuple[str, ...]) -> None:
    value = next((state[k] for k in keys if isinstance(state.get(k), Tensor)), None)
    if value is None:
        raise ValueError(
            f"state_dict holds {', '.join(map(str, state))} of {name}, and no {' or '.join(keys)}"
        )
    if value.shape != p.shape:
        raise ValueError(
            f"state_dict holds a state of shape {list(value.shape)} for {name}, which has "
            f"{list(p.shape)}: it is of other parameters, or of the same in another order"
        )


def _placed(optimizer: Converted, p: Tensor, state: State, group: Group, kind: str) -> State:
    """A state on the parameter's device, in the dtypes that it was saved in.

    What torch's own AdamW keeps for itself takes the parameter's dtype, as in torch's own load.
    """
    on_device = group.get("capturable") or group.get("fused")
    cast = kind == ADAMW and issubclass(optimizer.rest.kind, Adam)
    placed: State = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            placed[key] = copy.deepcopy(value)
        elif key == "step":
            placed[key] = value.to(p.device, torch.float32) if on_device else value
        elif cast and value.is_floating_point():
            placed[key] = value.to(p.device, p.dtype)
        else:
            placed[key] = value.to(p.device)
    if kind == MUON and "step" in placed and not isinstance(placed["step"], Tensor):
        placed["step"] = torch.tensor(steps_of(placed, group), dtype=torch.float32)
    return placed


def _replace(group: Group, new: Group) -> None:
    """Writes a saved group into the dict that schedulers hold; a tensor lr stays a tensor."""
    lr = group["lr"]
    new = {key: copy.deepcopy(value) for key, value in new.items() if key != "params"}
    if isinstance(lr, Tensor) and not isinstance(new["lr"], Tensor):
        new["lr"] = torch.full_like(lr, new["lr"])
    group.update(new)
