"""Every place of a model that holds a parameter, however it is wrapped and tied.

transformer.wte.weight and lm_head.weight       two sites of one tied parameter, in this order
_orig_mod.module.lm_head.weight                 the site lm_head.weight of a wrapped model
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moonfx.optim.roles.by_name import FLATTENED, WRAPPERS, unsaved


@dataclass(frozen=True)
class ParameterSite:
    """One attribute of one module that is a parameter.

    Args:
        name: the parameter's name by this site, without wrappers.
        module: what holds it.
        own: the attribute's name.
        parent: what holds the module, None for the model itself.
    """

    name: str
    module: nn.Module
    own: str
    parent: nn.Module | None

    @property
    def path(self) -> list[str]:
        """The module's name in parts, without those of peft."""
        return unsaved(self.name.split(".")[:-1])


def innermost(model: nn.Module) -> nn.Module:
    """The user's model inside torch.compile, DistributedDataParallel and their like."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The one module that a wrapper is around, None if it is none."""
    children = dict(module.named_children())
    if len(children) != 1:
        return None
    (name, child), *_ = children.items()
    if name == "module" and not _of_torch(module):
        return None  # a user's own module with a part called `module`
    return child if name in WRAPPERS else None


def _of_torch(module: nn.Module) -> bool:
    """Whether a wrapper's class is torch's or DeepSpeed's own, or of their kind."""
    root = type(module).__module__.split(".")[0]
    return root in ("torch", "deepspeed", "accelerate") or "Parallel" in type(module).__name__


def sites_of(model: nn.Module) -> dict[int, list[ParameterSite]]:
    """id of each parameter -> its sites, in the order of registration.

    A module that is shared is several sites, by each of its names.
    """
    found: dict[int, list[ParameterSite]] = {}

    def visit(module: nn.Module, path: list[str], parent: nn.Module | None, above: Any) -> None:
        if id(module) in above:
            return
        inner = _wrapped(module)
        for own, value in module.named_parameters(recurse=False):
            name = ".".join([*path, own])
            found.setdefault(id(value), []).append(ParameterSite(name, module, own, parent))
        for name, child in _children(module):
            shown = path if child is inner else [*path, name]
            visit(child, shown, parent if child is inner else module, above | {id(module)})

    visit(model, [], None, frozenset[int]())
    return found


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children by all of their names, which named_children does not give."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def check_owned(
    model: nn.Module,
    parameters: list[nn.Parameter] | tuple[nn.Parameter, ...],
    names: list[str] | tuple[str, ...],
    sites: dict[int, list[ParameterSite]],
) -> None:
    """Checks that a model owns the parameters of an optimizer.

    Raises:
        ValueError: naming those that it does not own.
    """
    strange = [
        f"{name or f'parameter {i}'} {list(p.shape)}"
        for i, (p, name) in enumerate(zip(parameters, names, strict=True))
        if id(p) not in sites
    ]
    if not strange:
        return
    shown = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
    hint = "give the model whose parameters the optimizer was made with, not a copy of it"
    if all(p.ndim < 2 for p in parameters):
        hint = f"all of them have one dimension, as {FLATTENED}"
    raise ValueError(
        f"model: this {type(innermost(model)).__name__} does not own {len(strange)} of the "
        f"optimizer's {len(parameters)} parameters: {shown}; {hint}"
    )


def is_flattened(parameter: torch.Tensor, name: str) -> bool:
    """Whether a parameter is a flattened shard, which has lost its matrices."""
    of_fsdp = type(parameter).__name__ == "FlatParameter" or name.endswith("_flat_param")
    return of_fsdp or (hasattr(parameter, "ds_id") and parameter.ndim < 2)
