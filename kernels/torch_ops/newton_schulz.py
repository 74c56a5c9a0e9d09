"""Newton-Schulz steps in torch operations: what runs where there is no faster kernel.

    A = X X^T;  X <- a X + (b A + c A^2) X      each step: 4 m^2 n + 2 m^3 FLOPs

X is [b, m, n] with m <= n. Each product's sums are float32 or better, and its result is rounded to
X's dtype, as torch.mm does. On a CPU each product is torch.mm's of one matrix, so that the bits are
those of a loop over the matrices; a batch takes less time where they are small (0.2 of it at
64 x 64 in bfloat16) and more where they are large (1.15 at 256 x 256 in float32). float16, which a
CPU multiplies a value at a time, is computed in float32 and rounded once.
"""

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients


def plain(X: Tensor, coefficients: Coefficients) -> Tensor:
    """The steps of [b, m, n], m <= n, in new memory."""
    if X.device.type != "cpu":
        return batched(X, coefficients)
    out = torch.empty(X.shape, dtype=X.dtype)
    dtype = torch.float32 if X.dtype == torch.float16 else X.dtype
    for matrix, result in zip(X, out, strict=True):
        result.copy_(one(matrix.to(dtype), coefficients))
    return out


def one(X: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients:
        A = torch.mm(X, X.mT)
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def batched(X: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients:
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X
