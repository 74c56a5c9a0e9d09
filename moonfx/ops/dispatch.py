"""Which kernels run on a device, and what they keep for the backward.

    CUDA and HIP, with Triton     moonfx.kernels.gpu.moba, imported when the first such tensor comes
    CPU, with a C++ compiler      moonfx.kernels.cpu.moba
    anything else                 moonfx.kernels.torch_ops.moba, torch operations, with one warning

Each is an `AttentionKernels`. Those of the GPU also give and take the routes, int32
[B, Hkv, Nq * G, K]: the blocks that each row attends. Finding them again is most of what a backward
would do twice.

What runs, and why, is logged once for each type of device by the logger moonfx.ops.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.fallback import warn_slow
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.torch_ops import moba as torch_ops

log = logging.getLogger("moonfx.ops")

# torch_ops waits on the host for its number of tiles, which a CUDA graph cannot record. That Triton
# is missing is known at once; that it does not serve this GPU, when a tensor is on one.
UNSAFE = torch.Tag.cudagraph_unsafe
TAGS = () if importlib.util.find_spec("triton") else (UNSAFE,)
OPERATORS = ("moba_attention", "moba_attention_backward")


class AttentionKernels(Protocol):
    """The face of a backend: a module with these functions."""

    @property
    def __name__(self) -> str: ...

    @property
    def available(self) -> Callable[[], str | None]:
        """Why the kernels cannot run on this machine, and the remedy; None where they can."""

    @property
    def forward(self) -> Callable[[Tensor, Tensor, Tensor, MobaArguments], tuple[Tensor, ...]]:
        """(query, key, value, arguments) -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq], maybe routes."""

    @property
    def backward(self) -> Callable[..., tuple[Tensor | None, ...]]:
        """(grad_out, grad_lse or None, query, key, value, out, lse, arguments, routes=...) -> the
        gradients of query, key and value, and that of the key bias, None without one. `routes` is
        given to kernels that gave some."""


Found = tuple[AttentionKernels | None, str | None]  # the kernels, or why there are none


@functools.cache
def find_triton_kernels() -> Found:
    """moonfx.kernels.gpu.moba, or why it cannot run and what to do about it."""
    reason: str | None
    try:
        module: Any = importlib.import_module("moonfx.kernels.gpu.moba")
        reason = module.available()
    except (ImportError, AttributeError) as error:  # it is missing, or too old to have all we use
        reason = f"Triton cannot be used ({error}): pip install 'triton>=3.6'"
    if reason is None:
        return module, None
    for name in OPERATORS:
        getattr(torch.ops.moonfx, name).default.tags.append(UNSAFE)
    return None, reason


def triton_kernels(device: torch.device) -> AttentionKernels | None:
    """moonfx.kernels.gpu.moba, where it is what runs on a device."""
    return find_triton_kernels()[0] if device.type == "cuda" else None


def find_cpu_kernels() -> Found:
    """moonfx.kernels.cpu.moba, or why it cannot run and what to do about it."""
    reason = cpu.available()
    return (cpu, None) if reason is None else (None, reason)


class DeviceKernels(NamedTuple):
    """Who computes what lies on one type of device."""

    where: str
    language: str
    find: Callable[[], Found]


BACKENDS = {
    "cuda": DeviceKernels("GPU", "Triton", find_triton_kernels),
    "cpu": DeviceKernels("CPU", "C++", find_cpu_kernels),
}


def kernel_for(device: torch.device) -> AttentionKernels:
    """The module whose `forward` and `backward` run on a device."""
    kernels, reason = triton_kernels(device), None
    backend = BACKENDS.get(device.type)
    if kernels is None and backend is not None:
        kernels, reason = backend.find()
    if kernels is None:
        kernels = torch_ops
        if backend is None:
            reason = f"there are no kernels for {device.type} tensors"
        else:
            what = f"attention on the {backend.where} runs as torch operations"
            warn_slow(f"{what}, several times slower than in {backend.language}", str(reason))
    _log_once(device.type, kernels.__name__, reason)
    return kernels


@functools.cache
def _log_once(device_type: str, module: str, reason: str | None) -> None:
    why = "" if reason is None else f", because {reason}"
    log.info("attention of %s tensors runs in %s%s", device_type, module, why)


def routes_shape(
    query: Tensor, key: Tensor, arguments: MobaArguments, recompute: bool
) -> tuple[int | torch.SymInt, ...]:
    """Of the operator's routes; (0,) where none are kept.

    As many columns as blocks are attended, but no length is a special case that compiles anew: so
    one block has two columns, for torch compiles a size of 1 by itself.
    """
    if recompute or triton_kernels(query.device) is None:
        return (0,)
    batch, heads, queries, _ = query.shape
    blocks = (key.shape[2] + arguments.block - 1) // arguments.block
    columns = torch.sym_min(arguments.topk, torch.sym_max(2, blocks))
    return batch, key.shape[1], queries * (heads // key.shape[1]), columns


def routes_to_keep(
    given: list[Tensor], query: Tensor, key: Tensor, arguments: MobaArguments, recompute: bool
) -> Tensor:
    """The operator's routes, of those that a kernel gave (none, or one tensor); -1 where it needed
    no further column."""
    shape = routes_shape(query, key, arguments, recompute)
    if not given or len(shape) == 1:
        return query.new_empty(0, dtype=torch.int32)
    missing = int(shape[3]) - given[0].shape[3]
    return F.pad(given[0], (0, missing), value=-1) if missing else given[0].contiguous()


def kept_routes(routes: Tensor, key: Tensor, arguments: MobaArguments) -> dict[str, Tensor]:
    """What a kernel's backward is given by name.

    Nothing where all keys are attended: the kernels then have one block of their own size.
    """
    everything = key.shape[2] <= arguments.block * arguments.topk
    return {} if everything or not routes.numel() else {"routes": routes}
