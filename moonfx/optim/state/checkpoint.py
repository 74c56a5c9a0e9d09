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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from moonfx.optim.matrices import Layout
from moonfx.optim.settings import ADAMW, GROUP_KEYS, MUON, PARAMETER_KEYS, Settings
from moonfx.optim.state.adamw import FIRST, Group, moment, steps_of
from moonfx.optim.state.handover import State, muon_state, second_moment

StateDict = dict[str, Any]


class StepsAdamW(Protocol):
    """What steps the parameters that stayed on AdamW, as the class `kind` does."""

    kind: type[Optimizer]


class Converted(Protocol):
    """As much of a moonfx.Muon as a checkpoint needs; its table's rows have a name and a layout."""

    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    settings: Settings
    table: list[Any]

    @property
    def rest(self) -> StepsAdamW: ...
    def retire_source(self) -> None: ...


BUFFER = "momentum_buffer"
_ADVICE = "; give the optimizer that is loaded into the same model, groups and roles="


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
    saved: list[Group] = state_dict["param_groups"]
    _check_sizes(optimizer, saved)
    own = ["optimizers" in group for group in saved]
    if all(own):
        groups, states = _own(optimizer, saved, state_dict["state"])
    elif not any(own):
        groups, states = _adamws(optimizer, saved, state_dict["state"])
    else:
        raise ValueError("state_dict has groups of a moonfx.Muon beside groups that are none")
    optimizer.retire_source()  # the state that it kept for the way back is not the one loaded
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        _replace(group, new)
    saved_layouts = [layout for group in optimizer.param_groups for layout in group["layouts"]]
    for i, (kind, dim, outer, sizes) in enumerate(saved_layouts):
        row, layout = optimizer.table[i], Layout(kind, dim, outer, tuple(sizes))
        if row.layout != layout:  # found by another rule than when the checkpoint was written
            optimizer.table[i] = row.with_layout(layout)
    optimizer.state = defaultdict(dict, states)


def _check_sizes(optimizer: Converted, saved: list[Group]) -> None:
    here = optimizer.param_groups
    if len(saved) != len(here):
        raise ValueError(f"state_dict has {len(saved)} groups, the optimizer {len(here)}{_ADVICE}")
    first = 0
    for i, (group, new) in enumerate(zip(here, saved, strict=True)):
        names = [row.name for row in optimizer.table[first : first + len(group["params"])]]
        if len(names) != len(new["params"]):
            raise ValueError(
                f"state_dict has {len(new['params'])} parameters in group {i}, the optimizer "
                f"{len(names)} ({', '.join(names[:3]) or 'none'}, ...){_ADVICE}"
            )
        first += len(names)


Member = tuple[str, Tensor, State, Group, int]


def _members(
    optimizer: Converted, saved: list[Group], states: Mapping[Any, State]
) -> Iterator[Member]:
    """Each parameter's name, itself, saved state and saved group, and its place there."""
    names = iter(optimizer.table)
    for group, new in zip(optimizer.param_groups, saved, strict=True):
        for i, (p, key) in enumerate(zip(group["params"], new["params"], strict=True)):
            yield next(names).name, p, _flat(states.get(key) or {}), new, i


def _flat(state: Mapping[str, Any]) -> State:
    """A state without the nested dict in which bitsandbytes saves what is quantized."""
    flat: State = {}
    for key, value in state.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def _own(
    optimizer: Converted, saved: list[Group], states: Mapping[Any, State]
) -> tuple[list[Group], dict[Tensor, State]]:
    """The groups and states of a Muon's state_dict."""
    loaded: dict[Tensor, State] = {}
    kinds = (kind for group in optimizer.param_groups for kind in group["optimizers"])
    for (name, p, state, group, i), kind in zip(
        _members(optimizer, saved, states), kinds, strict=True
    ):
        if group["optimizers"][i] != kind:
            raise ValueError(
                f"{name} is on {kind!r} here and on {group['optimizers'][i]!r} in state_dict: "
                "convert with the same model, example and roles= as when it was saved"
            )
        if state:
            _check_shape(name, p, state, (BUFFER,) if kind == MUON else FIRST)
            loaded[p] = _placed(optimizer, p, state, group, kind)
    return saved, loaded


def _adamws(
    optimizer: Converted, saved: list[Group], states: Mapping[Any, State]
) -> tuple[list[Group], dict[Tensor, State]]:
    """The groups and states that an AdamW's state_dict becomes."""
    loaded: dict[Tensor, State] = {}
    groups = [
        {**new, **_muon_keys(g)} for g, new in zip(optimizer.param_groups, saved, strict=True)
    ]
    for group in groups:
        group["second_moment"] = list(group["second_moment"])
    places = [(group, i) for group in groups for i in range(len(group["params"]))]
    converted = kept = 0
    for (name, p, state, new, _), (group, i) in zip(
        _members(optimizer, saved, states), places, strict=True
    ):
        if not state:
            continue
        if moment(state, FIRST) is None:
            raise ValueError(
                f"state_dict holds {', '.join(map(str, state))} of {name}, which is neither a "
                "moonfx.Muon's nor an AdamW's state"
            )
        _check_shape(name, p, state, FIRST)
        if group["optimizers"][i] == MUON:
            group["second_moment"][i] = second_moment(state, new, group["momentum"])
            low_bit = optimizer.settings.momentum_dtype
            loaded[p], converted = muon_state(p, state, new, low_bit), converted + 1
        else:
            loaded[p], kept = _placed(optimizer, p, state, new, ADAMW), kept + 1
    warnings.warn(
        "moonfx: an AdamW state_dict was loaded into a moonfx.Muon: the first moments of "
        f"{converted} parameters became their momentum and their second moments were dropped; "
        f"{kept} stay AdamW's as they are",
        stacklevel=4,
    )
    return groups, loaded


def _muon_keys(group: Group) -> Group:
    return {key: group[key] for key in (*GROUP_KEYS, *PARAMETER_KEYS)}


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
