"""A sharded model seen as the model that it was, for a trace that runs nothing.

    fully_shard           hooks gather a module's parameters before its forward, into other tensors
    parallelize_module    hooks make DTensors of inputs, and products of them meet shards

In neither does a graph read the parameters that an optimizer holds. So the hooks are away
meanwhile, and in each sharded parameter's place stands a plain one of its whole shape, zeros in one
number's memory. What two modules share stays shared.
"""

import contextlib
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Takes a model's shards away, and puts all back.

    Yields:
        id of each parameter that stands for a sharded one -> the sharded one; {} where none is.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    meant: dict[int, Tensor] = {}
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        yield meant
        return
    places = [(x, dict(x._parameters), dict(x._buffers)) for x in model.modules()]
    hooks = [(x, name, getattr(x, name)) for x in model.modules() for name in _HOOKS]
    try:
        for module, name, given in hooks:
            kept = OrderedDict((k, hook) for k, hook in given.items() if not _shards(hook))
            setattr(module, name, kept)
        for module, parameters, buffers in places:
            for name, p in parameters.items():
                if p is not None and hasattr(p, "full_tensor"):
                    other = stand_ins.setdefault(id(p), _stand_in(p))
                    module._parameters[name], meant[id(other)] = other, p
            for name, buffer in buffers.items():
                if hasattr(buffer, "full_tensor"):
                    module._buffers[name] = buffer.full_tensor()  # type: ignore[union-attr]
        yield meant
    finally:
        for module, name, given in hooks:
            setattr(module, name, given)
        for module, parameters, buffers in places:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _stand_in(p: Any) -> nn.Parameter:
    """Zeros where the model computes, which an offloaded shard is not."""
    device = p.device_mesh.device_type
    zero = torch.zeros((), dtype=p.dtype, device=device)
    return nn.Parameter(zero.expand(p.shape), requires_grad=p.requires_grad)


def _shards(hook: Callable[..., Any]) -> bool:
    """Whether a hook is torch.distributed's own."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(inspect.unwrap(hook), "__module__", "")).startswith("torch.distributed.")
