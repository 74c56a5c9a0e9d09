"""What a mask that is added to the scores keeps, or that it is no mask.

where(j <= i, 0, -inf) + (1 - real[b, j]) * min        keeps    j <= i and real[b, j]
"""

import sympy

from moonfx.passes.expressions import MASKED_BELOW, Expr, describe, to_number


class NotAMask(Exception):
    """A value that is neither kept (0) nor masked (hugely negative)."""


def kept(value: Expr) -> Expr:
    """The condition under which an additive mask value is 0.

    Raises:
        NotAMask: if a value can be neither 0 nor at most MASKED_BELOW.
    """
    value = to_number(value)
    if value.is_number:
        if value == 0:
            return sympy.true
        if value.is_extended_real and value <= MASKED_BELOW:
            return sympy.false
        raise NotAMask(f"the constant {describe(value)}")
    if isinstance(value, sympy.Piecewise):
        result, before = sympy.false, sympy.true
        for branch, condition in value.args:
            result = sympy.Or(result, sympy.And(before, condition, kept(branch)))
            before = sympy.And(before, sympy.Not(condition))
        return result
    if isinstance(value, sympy.Add):
        folded = sympy.piecewise_fold(value)
        if isinstance(folded, sympy.Piecewise):
            return kept(folded)
        return sympy.And(*(kept(term) for term in value.args))
    if isinstance(value, sympy.Mul):
        folded = sympy.piecewise_fold(value)
        if isinstance(folded, sympy.Piecewise):
            return kept(folded)
    raise NotAMask(f"its values {describe(value)} are not known to be 0 or below {MASKED_BELOW:g}")
