"""What is added to scores, as a mask and a bias: nothing of a bias is dropped, NaN is no mask."""

from typing import Any

import pytest
import sympy

from moonfx.passes.masks.additive import NotAMask, split
from moonfx.passes.symbolic.expressions import load_symbol
from moonfx.passes.symbolic.indices import HEAD, KEY, QUERY

SLOPE = load_symbol("slopes", whole=False)(HEAD)
REAL = sympy.Ne(load_symbol("real")(KEY), 0)
CAUSAL = KEY <= QUERY
LOW = sympy.Integer(-(10**9))


def choice(condition: Any, yes: Any, no: Any = -sympy.oo) -> Any:
    return sympy.Piecewise((yes, condition), (no, True))


# A value, where it keeps a key, its bias there, and the weakest value that hides.
SPLIT: list[tuple[str, Any, Any, Any, Any]] = [
    ("zero", sympy.Integer(0), sympy.true, 0, -sympy.oo),
    ("a constant bias", sympy.Integer(3), sympy.true, 3, -sympy.oo),
    ("everything is hidden", -sympy.oo, sympy.false, 0, -sympy.oo),
    ("just low enough", sympy.Integer(-(10**4)), sympy.false, 0, -(10**4)),
    ("not low enough", sympy.Integer(-9999), sympy.true, -9999, -sympy.oo),
    ("causal", choice(CAUSAL, 0), CAUSAL, 0, -sympy.oo),
    ("the other way round", choice(QUERY < KEY, LOW, 0), CAUSAL, 0, LOW),
    ("a bias", SLOPE * (KEY - QUERY), sympy.true, SLOPE * (KEY - QUERY), -sympy.oo),
    ("a bias where it is kept", choice(CAUSAL, SLOPE), CAUSAL, SLOPE, -sympy.oo),
    (
        "a mask, a mask and a bias",
        choice(CAUSAL, 0) + choice(REAL, 0, LOW) + SLOPE,
        sympy.And(CAUSAL, REAL),
        SLOPE,
        LOW,
    ),
    ("a mask times a number", 2 * choice(CAUSAL, 0, LOW), CAUSAL, 0, 2 * LOW),
    ("two biases", choice(CAUSAL, 1, 2), sympy.true, choice(CAUSAL, 1, 2), -sympy.oo),
]


@pytest.mark.parametrize(
    ("value", "keep", "bias", "weakest"), [s[1:] for s in SPLIT], ids=[s[0] for s in SPLIT]
)
def test_a_value_is_a_mask_and_a_bias(value: Any, keep: Any, bias: Any, weakest: Any) -> None:
    found = split(value)
    assert sympy.simplify(sympy.Equivalent(found.keep, keep)) == True  # noqa: E712
    assert sympy.expand(found.bias - bias) == 0
    assert found.weakest == weakest


NEITHER = [
    ("nan", sympy.nan),
    ("inf", sympy.oo),
    ("inf somewhere", choice(CAUSAL, 0, sympy.oo)),
    ("nan somewhere", choice(CAUSAL, sympy.nan, LOW)),
    ("a complex number", sympy.I),
    ("infinite by an index", sympy.oo * SLOPE),
]


@pytest.mark.parametrize("value", [n[1] for n in NEITHER], ids=[n[0] for n in NEITHER])
def test_what_may_be_nan_or_plus_infinity_is_neither(value: Any) -> None:
    with pytest.raises(NotAMask):
        split(value)
