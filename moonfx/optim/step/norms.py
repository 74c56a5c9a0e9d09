"""Matrices brought to norm 1, whatever their numbers' size.

In float32 a square overflows above 1.8e19 and vanishes below 1e-19, though the numbers are good
ones. So a matrix is divided by its largest magnitude first; on a GPU that is one more reading of it
and no wait.
"""

import math

import torch
from torch import Tensor


def normalized(stack: Tensor) -> Tensor:
    """Each matrix of [k, m, n] over its Frobenius norm, in float32 or the stack's wider dtype.

    Zeros stay zeros. A matrix that holds NaN or infinity becomes NaN, all of it, and no other does.
    """
    dtype = torch.promote_types(stack.dtype, torch.float32)
    largest = torch.linalg.vector_norm(stack.flatten(1), torch.inf, dim=1, dtype=dtype)
    largest = largest.clamp_min(torch.finfo(dtype).tiny)
    x = stack * largest.reciprocal()[:, None, None]
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1)  # 1 at least, but of zeros
    return x.mul_(norms.clamp_min(1).reciprocal()[:, None, None])


def root_mean_square(x: Tensor) -> float:
    return (torch.linalg.vector_norm(x.float()) / math.sqrt(max(1, x.numel()))).item()
