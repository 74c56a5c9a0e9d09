"""The root mean square that Newton-Schulz gives a matrix of independent entries, by law.

    X = U / |U|_F                      a matrix [m, n], m <= n, with singular values x, sum x^2 = 1
    O = NewtonSchulz(X)                its singular values are p(x), p the composed polynomial
    RMS(O) sqrt(n) = sqrt(mean p(x)^2)

Moonlight's lemma 1 (arXiv 2502.16982, appendix A) takes all p(x) as 1, so that RMS(O) is
1/sqrt(max(m, n)). Coefficients made for speed leave p(x) anywhere from 0.7 to 1.2, so the factor
really obtained depends on them and on the spectrum. For a matrix of independent entries the
spectrum is known: m x^2 follows the law of Marchenko and Pastur with ratio m/n.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from moonfx.optim.coefficients import composed

# Within 1e-4 of 8192 points for every published set up to [4096, 4096]; about a millisecond.
_POINTS = 512


def correction(m: int, n: int, coefficients: Sequence[Any]) -> float:
    """RMS(O) sqrt(max(m, n)) of a Gaussian [m, n], by quadrature over its singular values.

    Args:
        coefficients: (a, b, c) of each step, or all of them one after another.
    """
    numbers: list[float] = []
    for x in coefficients:
        numbers += x if isinstance(x, Sequence) else [x]
    return _correction(min(m, n), max(m, n), tuple(numbers))


@functools.lru_cache(maxsize=4096)
def _correction(m: int, n: int, numbers: tuple[float, ...]) -> float:
    triples = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
    if m == 1:  # one singular value, which is the norm
        return abs(composed(triples, 1.0))
    # z = m x^2 = 1 + g + 2 sqrt(g) cos t has the density (2/pi) sin(t)^2 / z in t: smooth, so that
    # the midpoint rule converges fast, also where the law has its edge at zero (m = n).
    g, total = m / n, 0.0
    for i in range(_POINTS):
        t = (i + 0.5) * math.pi / _POINTS
        z = 1 + g + 2 * math.sqrt(g) * math.cos(t)
        # No singular value exceeds the norm; the law of large matrices does not know that at m = 2.
        y = composed(triples, min(1.0, math.sqrt(z / m)))
        total += math.sin(t) ** 2 / z * y * y
    return math.sqrt(2 / _POINTS * total)


def noise_rms(beta1: float) -> float:
    """RMS of AdamW's update on independent gradients of mean zero, once its averages have settled.

    m_hat then has the variance (1 - b1)/(1 + b1) of one gradient, and v_hat its mean square.
    """
    return math.sqrt((1 - beta1) / (1 + beta1))
