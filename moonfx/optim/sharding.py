"""Which tensors are sharded over processes.

Told by what they can do and not by their class: to import that class takes longer than to import
all of moonfx.optim, and who has such tensors has imported it.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")
