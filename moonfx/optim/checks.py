"""What a conversion refuses, before any work: each error names what it was and what it may be."""

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence

from torch import nn

from moonfx.optim.roles.steppable import check_dense, check_initialized
from moonfx.optim.roles.table import RoleRow
from moonfx.optim.settings import GROUP_KEYS, MUON
from moonfx.optim.state.adamw import FIRST, SECOND, Source, moment
from moonfx.optim.state.floats import is_finite
from moonfx.optim.state.low_bit import BLOCKS
from moonfx.policy import check_flag

RMS = ("betas", "measured")
DECAYS = ("decoupled", "cautious", "coupled")
MOMENTUM_DTYPES = (None, *BLOCKS)

_FLATTENED = (
    "Every parameter is a vector, as the flattened shards of FSDP1 and of DeepSpeed's ZeRO are: "
    "the matrices cannot be seen. Use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP, or "
    "convert before the model is wrapped"
)


def check_settings(
    rms: object, momentum: object, decay: object, momentum_dtype: object, compile: object
) -> None:
    """The arguments of convert_optimizer that are numbers and words.

    Raises:
        TypeError: if one is of the wrong type.
        ValueError: if one is out of range.
    """
    choice = f"a number above 0 or one of {', '.join(map(repr, RMS))}"
    if isinstance(rms, str):
        if rms not in RMS:
            raise ValueError(f"rms must be {choice}, got {rms!r}")
    elif not _number(rms):
        raise TypeError(f"rms must be {choice}, got {rms!r} ({type(rms).__name__})")
    elif not 0 < float(rms) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"rms must be {choice}, got {rms!r}")
    if not _number(momentum):
        raise TypeError(f"momentum must be a number in [0, 1), got {momentum!r}")
    if not 0 <= float(momentum) < 1:  # type: ignore[arg-type]
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
    if decay is not None and decay not in DECAYS:
        raise ValueError(
            "decay must be None (as the optimizer does it) or one of "
            f"{', '.join(map(repr, DECAYS))}, got {decay!r}"
        )
    if momentum_dtype not in MOMENTUM_DTYPES:
        raise ValueError(
            "momentum_dtype must be None (that of exp_avg) or one of "
            f"{', '.join(map(repr, BLOCKS))}, got {momentum_dtype!r}"
        )
    if momentum_dtype is not None and not has_torchao():
        raise ValueError(
            f"momentum_dtype={momentum_dtype!r} needs torchao, which is not installed; "
            "it may be None"
        )
    if compile is not None:
        check_flag("compile", compile)


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def _number(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def check_groups(source: Source) -> None:
    """What Muon writes into the groups must not overwrite what they hold.

    Raises:
        ValueError: naming the key.
    """
    for i, group in enumerate(source.groups):
        for key in GROUP_KEYS:
            if key not in group:
                continue
            advice = f"rename it, as in group['my_{key}'] = group.pop('{key}')"
            if key in source.optimizer.defaults:
                advice = f"{source.word} itself reads it, so one that does not is to be converted"
            raise ValueError(
                f"param_groups[{i}] of adamw has a key '{key}', under which a moonfx.Muon keeps "
                f"something else: {advice}"
            )


def check_parameters(source: Source, names: Sequence[str], model: object) -> None:
    """Parameters must have numbers, all of the model's too, and be dense.

    Raises:
        ValueError: naming the parameter.
    """
    for name, (_, p) in zip(names, source.members(), strict=True):
        check_initialized(name, p)
        check_dense(name, p)
    if isinstance(model, nn.Module):
        for name, p in model.named_parameters():
            check_initialized(name, p)


def check_states(source: Source, names: Sequence[str]) -> None:
    """States must hold finite moments of the parameter's shape.

    Raises:
        ValueError: naming the parameter.
    """
    for name, (_, p) in zip(names, source.members(), strict=True):
        state = source.state(p)
        if not state:
            continue
        for words, keys in (("first", FIRST), ("second", SECOND)):
            value = moment(state, keys)
            if value is None:
                raise ValueError(
                    f"the state of {name} has no {words} moment ({' or '.join(keys)}), only "
                    f"{', '.join(map(str, state))}: {source.word} is not an AdamW that can be read"
                )
            if value.shape != p.shape:
                raise ValueError(
                    f"the {words} moment of {name} has shape {list(value.shape)}, the parameter "
                    f"{list(p.shape)}: {source.word} keeps it in a form that cannot be read"
                )
            if not is_finite(value):
                raise ValueError(
                    f"the {words} moment of {name} holds NaN or infinity: a bad gradient came in "
                    "earlier, and Muon would spread it over the whole matrix; go back to a "
                    "checkpoint from before it, or drop that state (adamw.state.pop(parameter))"
                )


def check_rms(source: Source, rms: object) -> None:
    """rms="measured" needs what it measures.

    Raises:
        ValueError: if there is no state yet.
    """
    if rms == "measured" and not any(source.state(p) for _, p in source.members()):
        raise ValueError(
            "rms='measured' takes each parameter's update RMS from its AdamW state, and there is "
            "none yet: take a few AdamW steps first, or use rms='betas' or a number such as 0.2"
        )


def check_some_muon(rows: Sequence[RoleRow]) -> None:
    """A conversion that converts nothing is an error.

    Raises:
        ValueError: with the roles found.
    """
    if any(row.optimizer == MUON for row in rows):
        return
    counts = Counter(row.role for row in rows)
    found = ", ".join(f"{count} {role}" for role, count in counts.most_common())
    why = f"e.g. {rows[0].name} {list(rows[0].shape)}: {rows[0].why}"
    advice = (
        _FLATTENED
        if all(len(row.shape) < 2 for row in rows)
        else "roles={name | 're:<regex>' | predicate: 'muon'} says which matrices go to Muon"
    )
    raise ValueError(
        f"no parameter goes to Muon: all {len(rows)} stay on AdamW ({found}; {why}). {advice}"
    )
