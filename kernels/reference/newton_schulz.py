"""The Newton-Schulz iteration by its definition: the oracle of every test, never on a hot path.

    X <- a X + (b A + c A^2) X,  A = X X^T        one step, with its own (a, b, c)
    s <- a s + b s^3 + c s^5                      what it does to each singular value s

With X = U diag(s) V^T the steps leave U and V alone, so the result is U diag(p(s)) V^T, where p is
the scalar map applied step by step. `by_singular_values` computes that, `by_products` the products.
Both compute in the matrix's own dtype: give them float64.
"""

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients

# Keller Jordan's (a, b, c), the same in every step (kellerjordan.github.io/posts/muon).
JORDAN = (3.4445, -4.7750, 2.0315)


def scalar_map(values: Tensor, coefficients: Coefficients) -> Tensor:
    """What the steps make of singular values."""
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def by_singular_values(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """U diag(p(s)) V^T of [m, n] or [b, m, n]."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left * scalar_map(values, coefficients).unsqueeze(-2) @ right


def by_products(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """The steps as they are written above, on the short side of [m, n] or [b, m, n]."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X
