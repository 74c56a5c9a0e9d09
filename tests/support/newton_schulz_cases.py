"""Matrices and coefficients on which Newton-Schulz steps are tried: never Gaussian ones only.

Bfloat16 fails on the others, each in its own way: small singular values drown in the large ones'
rounding, one large value goes through cancelling sums at every step, and values that lie on the
axes have no other entries over which their rounding averages out.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS = {
    "muon": [(3.4445, -4.7750, 2.0315)] * 5,
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar express": [
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
        (3.31842, -2.48849, 0.51005),
        (2.30065, -1.66890, 0.41881),
    ],
    "cubic": [
        (3.36566, -3.34210, 0.0),
        (2.57444, -1.49574, 0.0),
        (2.53690, -1.43126, 0.0),
        (2.44189, -1.27640, 0.0),
        (2.22305, -0.96307, 0.0),
    ],
    "ten steps": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def spectrum(smallest: float) -> Callable[[int, int], Tensor]:
    """Singular values from 1 down to `smallest`, evenly in their logarithm."""

    def make(m: int, n: int) -> Tensor:
        left, _, right = torch.linalg.svd(gaussian(m, n), full_matrices=False)
        return left * (smallest ** torch.linspace(0, 1, m, dtype=torch.float64)) @ right

    return make


def of_rank(rank: int) -> Callable[[int, int], Tensor]:
    return lambda m, n: gaussian(m, rank) @ gaussian(rank, n)


def spike(m: int, n: int) -> Tensor:
    """One singular value of about 0.9 over a Gaussian rest."""
    return gaussian(m, n) * 0.4 / (m * n) ** 0.5 + 0.9 * of_rank(1)(m, n) / (m * n) ** 0.5


def loud_row(m: int, n: int) -> Tensor:
    return gaussian(m, n) * torch.tensor([50.0] + [1.0] * (m - 1))[:, None]


def on_axes(*values: float) -> Callable[[int, int], Tensor]:
    """A diagonal matrix; without values, from 1 down to 1e-3."""

    def make(m: int, n: int) -> Tensor:
        line = torch.tensor(values or torch.logspace(0, -3, m).tolist(), dtype=torch.float64)
        matrix = torch.zeros(m, n, dtype=torch.float64)
        matrix[: len(line), : len(line)] = line.diag()
        return matrix

    return make


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "spectrum 1..1e-3": spectrum(1e-3),
    "spectrum 1..1e-6": spectrum(1e-6),
    "rank 12": of_rank(12),
    "rank 4": of_rank(4),
    "rank 1": of_rank(1),
    "spike": spike,
    "loud row": loud_row,
    "diagonal": on_axes(),
    "4 on the diagonal": on_axes(1.0, 0.8, 0.6, 0.4),
    "1 on the diagonal": on_axes(1.0),
}
# The first of these steps sends 1 to 1.99 and 1 + 2**-8 beyond 2, from where the next diverge: with
# one singular value, normalization leaves it to chance on which side it is.
DIVERGENT = {("polar express", "rank 1"), ("polar express", "1 on the diagonal")}

CASES = [
    (name, kind)
    for name, kind in itertools.product(COEFFICIENTS, MATRICES)
    if (name, kind) not in DIVERGENT
]

# Of the plain form, relative to the Frobenius norm of what is expected. The first column is for
# matrices whose largest values are most of them, the second for those that have none, or hardly
# any, in some directions: rounding gives them some, and those grow.
PLAIN = {
    # coefficients  bfloat16      float32        float16
    "muon": ((0.03, 0.3), (2e-6, 1e-4), (0.006, 0.05)),
    "quintic": ((0.03, 0.3), (2e-6, 1e-4), (0.002, 0.05)),
    "polar express": ((0.3, 0.4), (4e-5, 2e-4), (0.03, 0.1)),
    "cubic": ((0.1, 0.15), (4e-6, 4e-5), (0.02, 0.01)),
    "ten steps": ((0.01, 0.8), (2e-6, 1e-2), (0.002, 0.8)),
}
# Error allowed beyond the plain form's: times it, and added to it. A symmetric product differs in
# the order of its sums; runs also round A where the plain form computes it from the rounded X.
SYMMETRIC = {
    torch.bfloat16: (1.25, 2**-9),
    torch.float32: (2.0, 2**-21),
    torch.float16: (1.25, 2**-12),
}
GRAM = {
    torch.bfloat16: (4.0, 2**-6),
    torch.float32: (32.0, 2**-19),
    torch.float16: (8.0, 2**-7),
}


def tolerance(name: str, kind: str, dtype: torch.dtype) -> float:
    """Of the plain form."""
    return PLAIN[name][list(GRAM).index(dtype)][kind.startswith(("rank", "spectrum"))]


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def matrix(kind: str, m: int, n: int, dtype: torch.dtype, norm: float = 1.0) -> Tensor:
    """Of that Frobenius norm before it is rounded to `dtype`."""
    torch.manual_seed(0)
    X = MATRICES[kind](m, n)
    return (X * (norm / X.norm())).to(dtype)
