"""How many Newton-Schulz steps may go on between two visits of X, for their precision and cost.

A run of g steps reads X [m, n] once and writes it once; all else is on the short side, m x m:

    A = X X^T                               once a run
    Z = b A + c A^2                         each step, which is X <- (a + Z) X
    Q <- a Q + q Z + Z Q,  q <- a q         all the run's steps so far are q + Q
    A <- (a + Z)^2 A                        in place of X X^T
    X <- q X + Q X                          once a run

In half products (of symmetric matrices) a run costs 3 m^2 n + (4 g - 3) m^3. The A that it goes on
with is not that of the X that it will write: their difference is rounding, and later steps may
amplify it. In bfloat16 two steps at a time do as well as one with most coefficients and in most
places, but three can be off by any factor (one large singular value, quintic coefficients), which
neither a Gaussian matrix nor a test of finiteness shows.

`amplified` finds out for the coefficients at hand: on a singular value, all this is arithmetic of
scalars, so it rounds each result in turn and compares what becomes of it with what becomes of the
roundings of single steps. `choose_runs` takes the cheapest runs that are each within the dtype's
limit.
"""

import functools

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients

Steps = tuple[tuple[float, float, float], ...]

# A singular value sees the others' roundings too, which scalars do not show: in bfloat16 three
# steps can diverge where their own roundings die away again (eight quintic steps, then cubic ones).
LONGEST = {torch.bfloat16: 2}
MOST = 16  # steps; `amplified` takes time with their third power, and optimizers take five to ten
VALUES = 257  # singular values tried, evenly from 0 to 1
# How many times the error of single steps a run's may be, at any singular value: about what changes
# with the order of sums in bfloat16, and 1e-4 of the result in float32.
LIMITS = {torch.bfloat16: 4.0, torch.float16: 8.0}
LIMIT = 16.0


def run_flops(m: int, n: int, runs: tuple[int, ...]) -> int:
    """Of one [m, n], m <= n, with half of each symmetric product; a multiply-add is two."""
    return sum(3 * m * m * n + (4 * run - 3) * m**3 for run in runs)


def choose_runs(coefficients: Coefficients, dtype: torch.dtype, m: int, n: int) -> tuple[int, ...]:
    """The length of each run, for matrices with sides m <= n; single steps beyond MOST of them."""
    steps = tuple(coefficients)
    return _cheapest(steps, dtype, 3 * n / m) if len(steps) <= MOST else (1,) * len(steps)


@functools.lru_cache(maxsize=1024)
def _cheapest(steps: Steps, dtype: torch.dtype, visit: float) -> tuple[int, ...]:
    """`visit`: what reading and writing X costs, in m^3."""
    best: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # of the first i steps
    for end in range(1, len(steps) + 1):
        ways = []
        for length in range(1, min(end, LONGEST.get(dtype, 3)) + 1):
            factor = 1.0 if length == 1 else amplified(steps, dtype, end - length, length)
            if factor <= LIMITS.get(dtype, LIMIT):
                cost, factors, runs = best[end - length]
                ways.append((cost + visit + 4 * length - 3, factors + factor, (*runs, length)))
        best.append(min(ways))
    return best[-1][2]


@functools.lru_cache(maxsize=1024)
def amplified(steps: Steps, dtype: torch.dtype, start: int, length: int) -> float:
    """How many times larger the error gets, at the singular value where that is worst, if `length`
    steps from `start` are one run and all others are runs of one."""
    apart = (1,) * len(steps)
    runs = (*apart[:start], length, *apart[start + length :])
    ratio = _error(steps, dtype, runs) / (_error(steps, dtype, apart) + torch.finfo(dtype).eps)
    return float(ratio.nan_to_num(torch.inf).max())


@functools.lru_cache(maxsize=64)
def _error(steps: Steps, dtype: torch.dtype, runs: tuple[int, ...]) -> Tensor:
    """Of each singular value's result: the root of the squares of what each rounding does to it."""
    exact = _trace(steps, runs, 0.0)
    unit = torch.finfo(dtype).eps / 4  # half of the largest there is
    up, down = ((_trace(steps, runs, sign * unit) - exact).abs() for sign in (1, -1))
    return torch.maximum(up, down).square().sum(0).sqrt()


def _trace(steps: Steps, runs: tuple[int, ...], unit: float) -> Tensor:
    """[roundings, values]: row k has the k-th rounded result off by `unit`, relatively."""
    count = sum(6 * run - 2 for run in runs)
    rows = torch.arange(count)[:, None]
    site = -1

    def rounded(x: Tensor) -> Tensor:
        nonlocal site
        site += 1
        return torch.where(rows == site, x * (1 + unit), x)

    X = torch.linspace(0, 1, VALUES, dtype=torch.float64).expand(count, -1)
    remaining = iter(steps)
    for run in runs:
        A = rounded(X * X)
        for step in range(run):
            a, b, c = next(remaining)
            Z = rounded(b * A + c * A * A)
            if step == 0:
                q, Q = a, Z
            else:
                q, Q = a * q, rounded(a * Q + q * Z + Z * Q)
            if step + 1 < run:
                B = rounded(a * A + Z * A)
                A = rounded(a * B + Z * B)
        X = rounded(q * X + Q * X)
    return X
