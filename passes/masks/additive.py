"""What is added to the scores, as a mask and a bias.

    where(j <= i, 0, -inf) + where(real[b, j], 0, min) + slope[h] * (j - i)
    keep    j <= i and real[b, j]
    bias    slope[h] * (j - i)

A value far below every score hides its key. Everything else is a bias, and is never dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from moonfx.passes.masks.absorb import is_impossible
from moonfx.passes.symbolic.expressions import MASKED_BELOW, Expr, describe, to_number

# A mask beside a bias must stay far below scores that the bias moves; float16 can hold -65504.
MASKED_BESIDE_BIAS = -6e4


class NotAMask(Exception):
    """A value that can be neither a mask nor a bias."""


@dataclass(frozen=True)
class Added:
    """What an added value does.

    Args:
        keep: where it does not hide the key.
        bias: its value there.
        weakest: the largest of its values that count as hiding, -oo for none.
    """

    keep: Expr
    bias: Expr = sympy.S.Zero
    weakest: Expr = -sympy.oo


_HIDDEN = sympy.false


def split(value: Expr) -> Added:
    """A value as mask and bias.

    Raises:
        NotAMask: if it is NaN or +inf somewhere.
    """
    value = to_number(value)
    if value.is_number:
        return _constant(value)
    if isinstance(value, sympy.Add | sympy.Mul) and value.has(sympy.Piecewise):
        folded = sympy.piecewise_fold(value) if isinstance(value, sympy.Mul) else value
        if isinstance(folded, sympy.Piecewise):
            return _chosen(folded)
        if isinstance(folded, sympy.Add):
            parts = [split(term) for term in folded.args]
            return Added(
                sympy.And(*(p.keep for p in parts)),
                sympy.Add(*(p.bias for p in parts)),
                sympy.Max(*(p.weakest for p in parts)),
            )
    if isinstance(value, sympy.Piecewise):
        return _chosen(value)
    if value.has(sympy.nan, sympy.oo, -sympy.oo, sympy.zoo):
        raise NotAMask(f"its values {describe(value)} may be infinite")
    return Added(sympy.true, value)


def _constant(value: Expr) -> Added:
    if not value.is_extended_real or value == sympy.oo:
        raise NotAMask(f"the constant {describe(value)}")
    if value <= MASKED_BELOW:
        return Added(_HIDDEN, weakest=value)
    return Added(sympy.true, value)


def _chosen(value: sympy.Piecewise) -> Added:
    keep, before = sympy.false, sympy.true
    weakest = -sympy.oo
    biases: list[tuple[Expr, Expr]] = []
    for branch, condition in _pieces(value):
        if is_impossible(sympy.And(before, condition)):
            continue
        part = split(branch)
        here = sympy.And(before, condition, part.keep)
        keep, weakest = sympy.Or(keep, here), sympy.Max(weakest, part.weakest)
        before = sympy.And(before, sympy.Not(condition))
        if part.keep != False:  # noqa: E712
            biases.append((part.bias, here))
    if len({bias for bias, _ in biases}) <= 1:
        bias = biases[0][0] if biases else sympy.S.Zero
    else:
        bias = sympy.Piecewise(*biases[:-1], (biases[-1][0], True))
    return Added(keep, bias, weakest)


def _pieces(value: Expr) -> Iterator[tuple[Expr, Expr]]:
    """The values of a choice and their conditions, of which the first that holds counts."""
    for branch, condition in value.args:
        if isinstance(branch, sympy.Piecewise):
            yield from ((v, sympy.And(condition, inner)) for v, inner in _pieces(branch))
        else:
            yield branch, condition
