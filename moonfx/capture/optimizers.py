"""What torch keeps on an optimizer beside its state: hooks, its `step`, marks for schedulers."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

_HOOKS = (
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
)


def bare_step(kind: type) -> Callable[..., Any]:
    """The `step` of a class of optimizers without the hooks that torch runs around it."""
    step: Callable[..., Any] = kind.step  # type: ignore[attr-defined]
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def share_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Gives `target` the very hooks of `source`: a handle still removes what it registered."""
    for name in _HOOKS:
        if name in vars(source):
            setattr(target, name, getattr(source, name))


def without_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's pickle may carry: hooks stay, as torch's own optimizers have it."""
    return {k: v for k, v in attributes.items() if k not in _HOOKS and k != "step"}


def no_hooks() -> dict[str, Any]:
    """The hooks of an optimizer that has none."""
    return {name: OrderedDict() for name in _HOOKS}


def load_hooks(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[Any]]:
    """What the user registered to run before and after load_state_dict."""
    before = optimizer._optimizer_load_state_dict_pre_hooks
    after = optimizer._optimizer_load_state_dict_post_hooks
    return list(before.values()), list(after.values())


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tells the schedulers of an optimizer that it has stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def replace_step(optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> None:
    """Puts another `step` on one optimizer, without a warning from its schedulers."""
    optimizer.step = stands_for_step(step)  # type: ignore[method-assign]


def stands_for_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what may be put on an optimizer as its `step` without a warning from its schedulers."""
    function._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return function


def watched() -> bool:
    """Whether some mode sees each operator that runs, so that what is none would be missed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
