"""Which kernel runs on a device, and what it keeps for the backward.

    CUDA and HIP, with Triton     moonfx.kernels.gpu.moba, imported when the first such tensor comes
    CPU, with a C++ compiler      moonfx.kernels.cpu.moba
    anything else                 moonfx.kernels.torch_ops.moba, torch operations, with one warning

Each has forward(query, key, value, *policy) -> (out, lse) and backward(...). Those of the GPU also
give and take the routes, int32 [B, Hkv, Nq * G, K]: the blocks that each row attends. Finding them
again is most of what a backward would do twice.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.fallback import warn_slow
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.torch_ops import moba as tiled

# torch_ops waits on the host for its number of tiles, which a CUDA graph cannot record. That Triton
# is missing is known at once; that it does not serve this GPU, when a tensor is on one.
UNSAFE = torch.Tag.cudagraph_unsafe
TAGS = () if importlib.util.find_spec("triton") else (UNSAFE,)
OPERATORS = ("moba_attention", "moba_attention_backward")


@functools.cache
def find_triton_kernels() -> tuple[ModuleType | None, str | None]:
    """moonfx.kernels.gpu.moba, or why it cannot run and what to do about it."""
    reason: str | None
    try:
        module = importlib.import_module("moonfx.kernels.gpu.moba")
        reason = module.available()
    except (ImportError, AttributeError) as error:  # it is missing, or too old to have all we use
        reason = f"Triton cannot be used ({error}): pip install 'triton>=3.6'"
    if reason is None:
        return module, None
    for name in OPERATORS:
        getattr(torch.ops.moonfx, name).default.tags.append(UNSAFE)
    return None, reason


def triton_kernels(device: torch.device) -> ModuleType | None:
    """moonfx.kernels.gpu.moba, where it is what runs on a device."""
    return find_triton_kernels()[0] if device.type == "cuda" else None


def kernel_for(device: torch.device) -> ModuleType:
    """The module whose `forward` and `backward` run on a device."""
    kernel = triton_kernels(device)
    if kernel is not None:
        return kernel
    if device.type == "cpu":
        if (reason := cpu.available()) is None:
            return cpu
        what = "attention on the CPU runs as torch operations, several times slower than in C++"
        warn_slow(what, reason)
    elif device.type == "cuda":
        what = "attention on the GPU runs as torch operations, several times slower than in Triton"
        warn_slow(what, str(find_triton_kernels()[1]))
    return tiled


def routes_shape(
    query: Tensor, key: Tensor, block: int, topk: int, recompute: bool
) -> tuple[int | torch.SymInt, ...]:
    """Of the operator's routes; (0,) where none are kept.

    As many columns as blocks are attended, but no length is a special case that compiles anew: so
    one block has two columns, for torch compiles a size of 1 by itself.
    """
    if recompute or triton_kernels(query.device) is None:
        return (0,)
    batch, heads, queries, _ = query.shape
    columns = torch.sym_min(topk, torch.sym_max(2, (key.shape[2] + block - 1) // block))
    return batch, key.shape[1], queries * (heads // key.shape[1]), columns


def routes_to_keep(
    given: list[Tensor], query: Tensor, key: Tensor, block: int, topk: int, recompute: bool
) -> Tensor:
    """The operator's routes, of those that a kernel gave (none, or one tensor); -1 where it needed
    no further column."""
    shape = routes_shape(query, key, block, topk, recompute)
    if not given or len(shape) == 1:
        return query.new_empty(0, dtype=torch.int32)
    missing = int(shape[3]) - given[0].shape[3]
    return F.pad(given[0], (0, missing), value=-1) if missing else given[0].contiguous()


def kept_routes(routes: Tensor, key: Tensor, block: int, topk: int) -> dict[str, Tensor]:
    """What a kernel's backward is given by name.

    Nothing where all keys are attended: the kernels then have one block of their own size.
    """
    return {"routes": routes} if routes.numel() and key.shape[2] > block * topk else {}
