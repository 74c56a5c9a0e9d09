"""Values as expressions: what a dtype holds of them, and choices between them."""

from typing import Any

import pytest
import sympy
import torch

from moonfx.passes.symbolic.expressions import (
    choose,
    constant,
    describe,
    divided,
    head_symbol,
    is_boolean,
    load_symbol,
    loads,
    name_of,
    stored,
    to_bool,
    to_number,
)

I, J, N = sympy.symbols("i j N", integer=True, nonnegative=True)
WHOLE, REAL = load_symbol("ids")(I), load_symbol("x", whole=False)(I)
CHOICE = sympy.Piecewise((0, J <= I), (-sympy.oo, True))

# An expression, a dtype, and what a tensor of it holds; None for "not known".
STORED: list[tuple[str, Any, torch.dtype, Any]] = [
    ("an index", I + N, torch.int64, I + N),
    ("an index in float32", I + N, torch.float32, I + N),
    ("an index in bfloat16", I + N, torch.bfloat16, None),
    ("a part of an index", I / 3, torch.float32, None),
    ("a large multiple of an index", I * 2**21, torch.float32, None),
    ("a number that rounds", sympy.Rational(1, 10), torch.float16, constant(0.0999755859375)),
    ("a number too large for half", sympy.Integer(-(10**9)), torch.float16, -sympy.oo),
    ("a number too large for int8", sympy.Integer(300), torch.int8, None),
    ("a part of one as an integer", sympy.Rational(1, 2), torch.int64, None),
    ("a truth value as a number", J <= I, torch.float32, sympy.Piecewise((1, J <= I), (0, True))),
    ("a number as a truth value", WHOLE, torch.bool, sympy.Ne(WHOLE, 0)),
    ("a choice", CHOICE, torch.bfloat16, CHOICE),
    ("an unknown as it is", REAL, torch.bfloat16, REAL),
    ("a sum of unknown floats", REAL + 1, torch.float32, None),
    ("a sum of unknown integers", WHOLE + 1, torch.int64, WHOLE + 1),
    ("infinity and an index", I + sympy.oo * N, torch.float32, None),
    ("a complex number", sympy.I, torch.complex64, None),
]


@pytest.mark.parametrize(
    ("expr", "dtype", "expected"), [s[1:] for s in STORED], ids=[s[0] for s in STORED]
)
def test_a_dtype_holds_an_expression_exactly_or_it_is_not_known(
    expr: Any, dtype: torch.dtype, expected: Any
) -> None:
    assert stored(expr, dtype) == expected


def test_a_choice_of_truth_values_is_one_and_of_numbers_is_a_piecewise() -> None:
    assert choose(J <= I, sympy.true, J > N) == sympy.Or(J <= I, sympy.And(J > I, J > N))
    assert choose(sympy.true, I, J) == I
    assert choose(sympy.false, I, J) == J
    assert choose(J <= I, N, N) == N
    assert choose(J <= I, I, J) == sympy.Piecewise((I, J <= I), (J, True))


def test_numbers_and_truth_values_become_each_other() -> None:
    assert to_bool(to_number(I >= J)) == (I >= J)
    assert to_bool(CHOICE) == (I < J)
    assert to_bool(WHOLE) == sympy.Ne(WHOLE, 0)
    assert not is_boolean(I), "to sympy a symbol is a truth value"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, sympy.true),
        (2.0, sympy.Integer(2)),
        (float("-inf"), -sympy.oo),
        (float("nan"), sympy.nan),
        (3, sympy.Integer(3)),
    ],
)
def test_a_scalar_is_what_it_was(given: object, expected: Any) -> None:
    assert constant(given) is expected


def test_a_batch_with_heads_in_it_is_taken_apart_where_the_heads_are_known() -> None:
    h = head_symbol(4)
    assert divided(4 * I + h, sympy.Integer(4)) == (I, h)
    assert divided(8 * I + h, sympy.Integer(4)) == (2 * I, h)
    # Fewer than the heads: h // 2 is not 0.
    assert divided(4 * I + h, sympy.Integer(2))[1] != h
    assert divided(I, sympy.Integer(4)) == (sympy.floor(I / 4), sympy.Mod(I, 4))


def test_unknown_values_are_found_by_name_and_reasons_stay_short() -> None:
    assert {name_of(x) for x in loads(WHOLE + REAL * I)} == {"ids", "x"}
    assert loads(I + N) == []
    assert describe(WHOLE + 1) == "ids(i) + 1"
    assert len(describe(sympy.Add(*(load_symbol(f"name_{n}")(I) for n in range(40))))) == 120
