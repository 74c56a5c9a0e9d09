"""Newton-Schulz steps in torch operations: what runs where there is no faster kernel.

    plain    A = X X^T;  X <- a X + (b A + c A^2) X      each step: 4 m^2 n + 2 m^3 FLOPs
    by_runs  the same by runs of steps (newton_schulz_runs.py has the algebra)

X is [b, m, n] with m <= n. Each product's sums are float32 or better, and its result is rounded to
X's dtype, as torch.mm does. On a CPU one product after another is faster than a batch of them
(2 to 8 times at 64 x 64 in bfloat16), and float16, which it multiplies a value at a time, is
computed in float32 and rounded once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moonfx.kernels.reference_newton_schulz import Coefficients


def plain(X: Tensor, coefficients: Coefficients) -> Tensor:
    """The steps of [b, m, n], m <= n, in new memory."""
    return by_runs(X, coefficients, (1,) * len(coefficients))


def by_runs(X: Tensor, coefficients: Coefficients, runs: Sequence[int]) -> Tensor:
    """The steps of [b, m, n], m <= n, in new memory; `runs` sum to the number of steps."""
    if X.device.type != "cpu":
        return iterate(torch.bmm, torch.baddbmm, X, coefficients, runs)
    out = torch.empty(X.shape, dtype=X.dtype)
    dtype = torch.float32 if X.dtype == torch.float16 else X.dtype
    for matrix, result in zip(X, out, strict=True):
        result.copy_(iterate(torch.mm, torch.addmm, matrix.to(dtype), coefficients, runs))
    return out


def iterate(
    product: Callable[..., Tensor],
    add_product: Callable[..., Tensor],
    X: Tensor,
    coefficients: Coefficients,
    runs: Sequence[int],
) -> Tensor:
    """product: mm or bmm; add_product(M, L, R, beta, alpha) = beta M + alpha L R."""
    steps = iter(coefficients)
    for run in runs:
        A = product(X, X.mT)
        for step in range(run):
            a, b, c = next(steps)
            Z = add_product(A, A, A, beta=b, alpha=c)
            if step == 0:
                q, Q = a, Z
            else:
                Q = add_product(torch.add(a * Q, Z, alpha=q), Z, Q)
                q *= a
            if step + 1 < run:
                B = add_product(A, Z, A, beta=a)
                A = add_product(B, Z, B, beta=a)
        X = add_product(X, Q, X, beta=q)
    return X
