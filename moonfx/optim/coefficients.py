"""The published coefficient sets of the Newton-Schulz iteration.

One step takes X to a X + (b A + c A^2) X with A = X X^T, so each singular value goes through the
odd polynomial p(x) = a x + b x^3 + c x^5; a set is one triple (a, b, c) per step. All of them
expect X normalized by its Frobenius norm, so that singular values start in (0, 1].

Tables of one name are not interchangeable: these are scaled for a norm of exactly 1. Polar Express
circulates with safety factors 1.01, 1.02 and 1.05 and with norms multiplied by 1.01 or 1.02; a
factor s turns (a, b, c) into (a/s, b/s^3, c/s^5), and just above its interval the map explodes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moonfx.kernels.reference.newton_schulz import JORDAN

Triple = tuple[float, float, float]


class Schedule(NamedTuple):
    """The triples of one published set.

    Args:
        triples: one per step, in order.
        then: the triple of each later step; None where the set is made for exactly these steps.
    """

    triples: tuple[Triple, ...]
    then: Triple | None


# Amsel et al. 2025, arXiv 2505.16932, algorithm 1: optimal on [0.001, 1], before the safety factor.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
SAFETY = 1.01  # the paper's own (section 4.4): rounding may lift a singular value just above 1


def _safe(triples: tuple[Triple, ...], s: float) -> tuple[Triple, ...]:
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in triples)


COEFFICIENTS: dict[str, Schedule] = {
    # Keller Jordan, kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982; torch.optim.
    "muon": Schedule((JORDAN,), JORDAN),
    # You Jiacheng, in modded-nanogpt; "quintic" in NVIDIA's Emerging-Optimizers.
    "quintic": Schedule(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        None,
    ),
    # The polynomial that the set ends in goes without the safety factor: 1 is its fixed point.
    "polar_express": Schedule(_safe(POLAR_EXPRESS, SAFETY), (1.875, -1.25, 0.375)),
    # DeepSeek-V4, as Emerging-Optimizers gives it: eight fast steps, two that converge.
    "deepseek_v4": Schedule((JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, None),
    # "cubic5" in Emerging-Optimizers: one product fewer per step.
    "cubic": Schedule(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        None,
    ),
}
# A usable set keeps singular values near 1; what grows past this has diverged.
_LARGEST = 4.0


def per_step(coefficients: str | Sequence[object], steps: int | None = None) -> list[list[float]]:
    """The triples (a, b, c) of each step, as plain lists that an optimizer's state_dict can carry.

    Args:
        coefficients: a name in COEFFICIENTS, one triple for all steps, or one triple per step.
        steps: how many; None takes as many as were given or published (5 for one triple).
    Raises:
        ValueError: for an unknown name, a triple that is not three finite numbers, another number
            of steps than the set is made for, or triples under which a normalized matrix diverges.
        TypeError: if coefficients is neither a name nor a sequence, or steps is not an integer.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise TypeError(f"steps must be an integer, not {steps!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients must be one of {', '.join(COEFFICIENTS)}, or triples (a, b, c); "
                f"not {coefficients!r}"
            )
        return _published(coefficients, steps)
    if not isinstance(coefficients, Sequence) or not coefficients:
        raise TypeError(
            f"coefficients must be a name or a sequence of triples (a, b, c), not {coefficients!r}"
        )
    one = all(isinstance(x, (int, float)) for x in coefficients)
    triples = [_triple(x) for x in ([coefficients] * (steps or 5) if one else coefficients)]
    if steps is not None and len(triples) != steps:
        raise ValueError(
            f"coefficients has {len(triples)} triples, one per step, so steps must be "
            f"{len(triples)}, not {steps}"
        )
    if (largest := max(abs(y) for y in _samples(triples))) > _LARGEST:
        raise ValueError(
            f"coefficients diverge: a singular value in [0, 1] goes to {largest:.3g} within "
            f"{len(triples)} steps, where at most {_LARGEST:g} is allowed"
        )
    return triples


def composed(coefficients: Sequence[Sequence[float]], x: float) -> float:
    """What the steps make of a singular value x."""
    for a, b, c in coefficients:
        square = x * x
        x = x * (a + square * (b + c * square))
    return x


def _published(name: str, steps: int | None) -> list[list[float]]:
    triples, then = COEFFICIENTS[name]
    if then is None:
        if steps is not None and steps != len(triples):
            raise ValueError(
                f"coefficients={name!r} is made for exactly {len(triples)} steps: "
                f"give steps={len(triples)}, not {steps}"
            )
        return [list(triple) for triple in triples]
    steps = steps or 5
    return [list(triple) for triple in (triples + (then,) * steps)[:steps]]


def _triple(triple: object) -> list[float]:
    if (
        not isinstance(triple, Sequence)
        or len(triple) != 3
        or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in triple)
    ):
        raise ValueError(
            f"each triple of coefficients must be three finite numbers, not {triple!r}"
        )
    return [float(x) for x in triple]


def _samples(triples: list[list[float]]) -> list[float]:
    """The composed map on [0.0001, 1]; infinite where a step leaves all bounds."""
    values = []
    for i in range(401):
        x = 10 ** (-i / 100)
        for triple in triples:
            x = composed([triple], x) if abs(x) < 1e6 else math.inf
        values.append(x)
    return values
