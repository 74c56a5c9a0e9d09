"""Conditions on unknown values: key padding, or by name what else they are."""

import re
from typing import Any

import pytest
import sympy

from moonfx.passes.masks.padding import heads_of, of_values
from moonfx.passes.symbolic.expressions import load_symbol
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY

real, ids = load_symbol("real"), load_symbol("ids")
N = sympy.Symbol("N", integer=True, positive=True)

PADDING: list[tuple[str, Any]] = [
    ("of a row", sympy.Ne(real(BATCH, KEY), 0)),
    ("with dims of 1", sympy.Ne(real(BATCH, 0, 0, KEY), 0)),
    ("one for all rows", sympy.Ne(real(KEY), 0)),
    ("from a later key", sympy.Ne(real(BATCH, KEY + 2), 0)),
    ("heads folded into the rows", sympy.Ne(real(sympy.floor(BATCH / 4), KEY), 0)),
    ("compared with a number", real(BATCH, KEY) > 3),
    ("up to a length", real(0) >= KEY),
    ("up to a length of the row", real(BATCH) > KEY),
    ("with the key", real(BATCH, KEY) <= KEY),
    ("two of them", sympy.Ne(real(BATCH, KEY) + ids(BATCH, KEY), 0)),
]


@pytest.mark.parametrize("atom", [p[1] for p in PADDING], ids=[p[0] for p in PADDING])
def test_what_says_which_keys_are_real_is_padding(atom: Any) -> None:
    assert of_values(atom) == ""


OTHERS: list[tuple[str, Any, str]] = [
    ("by head", sympy.Ne(real(HEAD, KEY), 0), "the mask 'real' differs by head"),
    ("whole", sympy.Ne(real(BATCH, QUERY, KEY), 0), "the values of the mask 'real' are not known"),
    ("of queries", sympy.Ne(real(BATCH, QUERY), 0), "whole queries are masked by 'real'"),
    ("of rows", sympy.Ne(real(BATCH), 0), "whole rows of the batch are masked by 'real'"),
    (
        "equal ids",
        sympy.Eq(ids(BATCH, QUERY), ids(BATCH, KEY)),
        "packed sequences: .* 'ids', which",
    ),
    ("other ids", ids(BATCH, KEY) <= ids(BATCH, QUERY), "packed sequences: .*compare segment ids"),
    ("with the query", real(BATCH, KEY) <= QUERY, "the mask mixes query positions with 'real'"),
    ("read by key and row", sympy.Ne(real(KEY, BATCH), 0), "the padding mask 'real' is not read"),
    (
        "from an earlier key",
        sympy.Ne(real(BATCH, KEY - 1), 0),
        "the padding mask 'real' is not",
    ),
    ("backwards", sympy.Ne(real(BATCH, N - KEY), 0), "the padding mask 'real' is not read at"),
    ("every second row", sympy.Ne(real(2 * BATCH, KEY), 0), "the padding mask 'real' is not read"),
]


@pytest.mark.parametrize(("atom", "reason"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
def test_what_only_looks_like_padding_is_named(atom: Any, reason: str) -> None:
    assert re.match(reason, of_values(atom))


@pytest.mark.parametrize(
    ("row", "heads"),
    [
        (sympy.floor(BATCH / 4), 4),
        (sympy.floor(BATCH / 3 + sympy.Rational(1, 3)), None),
        (sympy.floor(2 * BATCH / 3), None),
        (sympy.floor(QUERY / 4), None),
        (BATCH, None),
    ],
)
def test_heads_in_the_batch_are_counted(row: Any, heads: int | None) -> None:
    assert heads_of(row) == heads
