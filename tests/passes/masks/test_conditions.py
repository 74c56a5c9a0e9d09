"""What one condition of a mask is: causal, padding, always, or by name what stands in the way."""

import itertools
import re
from typing import Any

import pytest
import sympy

from moonfx.passes.masks.conditions import (
    ALWAYS,
    CAUSAL,
    OTHER,
    PADDING,
    SHIFTED,
    WINDOW,
    Atom,
    at_most_zero,
    classify_atom,
    never_positive,
)
from moonfx.passes.symbolic.expressions import load_symbol
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY, Lengths

N, P = sympy.symbols("N P", integer=True, positive=True)
i, j = QUERY, KEY
real, ids = load_symbol("real"), load_symbol("ids")
PROMPT = Lengths((N,), (N,), one_query=False)
CACHED = Lengths((N,), (N + P,), one_query=False)
STEP = Lengths((sympy.Integer(1),), (N,), one_query=True)


def chunks(size: int) -> Any:
    return sympy.Eq(sympy.floor(i / size), sympy.floor(j / size))


ATOMS: list[tuple[str, Any, Lengths, str, str]] = [
    ("causal", j <= i, PROMPT, CAUSAL, ""),
    ("causal with a cache", j <= i + P, CACHED, CAUSAL, ""),
    ("causal as less than", j < i + P + 1, CACHED, CAUSAL, ""),
    ("without the cache", j <= i, CACHED, SHIFTED, "causal with offset 0, where .* at P"),
    ("strict", j < i, PROMPT, SHIFTED, "causal with offset -1"),
    ("padding", sympy.Ne(real(BATCH, j), 0), PROMPT, PADDING, ""),
    ("a key that is there", j < N, PROMPT, ALWAYS, ""),
    ("a query that is there", i <= N - 1, PROMPT, ALWAYS, ""),
    ("a key that may not be there", j < N - 1, PROMPT, OTHER, "unsupported mask condition"),
    ("later or all", sympy.Or(j <= i, i >= 0), PROMPT, ALWAYS, ""),
    ("causal or never", sympy.Or(j <= i, j >= N), PROMPT, CAUSAL, ""),
    ("window", j > i - 5, PROMPT, WINDOW, "sliding window of 5 tokens$"),
    ("window with a cache", j > i + P - 5, CACHED, WINDOW, "sliding window of 5 tokens$"),
    ("window of a step", j >= N - 5, STEP, WINDOW, "sliding window of 5 tokens$"),
    ("to both sides", sympy.Abs(i - j) <= 3, PROMPT, WINDOW, "sliding window of 7 .*, 3 to either"),
    ("chunks", chunks(4), PROMPT, OTHER, "chunked attention of 4 tokens"),
    ("prefix", sympy.Or(j <= i, j < real(BATCH)), PROMPT, OTHER, "prefix-LM: .* .by 'real'."),
    (
        "groups",
        sympy.Or(j <= i, sympy.Eq(ids(BATCH, i), ids(BATCH, j))),
        PROMPT,
        OTHER,
        "a choice between masks: causal, or .*by 'ids'",
    ),
    ("a choice by head", sympy.Or(j <= i, sympy.Eq(HEAD, 1)), PROMPT, OTHER, "unsupported mask"),
    ("twice the key", 2 * j <= i, PROMPT, OTHER, "unsupported mask condition"),
    ("nothing", sympy.false, PROMPT, OTHER, "the mask hides every key"),
    ("everything", sympy.true, PROMPT, ALWAYS, ""),
]


@pytest.mark.parametrize(
    ("atom", "lengths", "kind", "reason"), [a[1:] for a in ATOMS], ids=[a[0] for a in ATOMS]
)
def test_a_condition_is_named(atom: Any, lengths: Lengths, kind: str, reason: str) -> None:
    found = classify_atom(atom, lengths)
    assert found.kind == kind
    assert re.match(reason, found.reason) if reason else found == Atom(kind)


def test_a_window_tells_its_size() -> None:
    assert classify_atom(j > i - 5, PROMPT).size == 5
    assert classify_atom(sympy.Abs(i - j) <= 3, PROMPT).size == 7


@pytest.mark.parametrize(
    "atom", [j <= i + 2, j < i + 2, j >= i - 2, j > i - 2], ids=["<=", "<", ">=", ">"]
)
def test_a_relation_of_integers_is_a_bound(atom: Any) -> None:
    bound = at_most_zero(atom)
    for place in itertools.product(range(6), range(6)):
        values = dict(zip((i, j), place, strict=True))
        assert bool(atom.subs(values)) == (bound.subs(values) <= 0)


def test_what_is_no_order_is_no_bound() -> None:
    assert at_most_zero(sympy.Eq(i, j)) is None


@pytest.mark.parametrize(
    ("bound", "lengths", "expected"),
    [
        (j - N + 1, PROMPT, True),
        (j - N + 2, PROMPT, False),
        (j + i - 2 * N + 2, PROMPT, True),
        (-j, PROMPT, True),
        (1 - j, PROMPT, False),
        (j - N - P + 1, CACHED, True),
        (j - N + 1, CACHED, False),
        (N * j, PROMPT, False),
    ],
)
def test_a_bound_holds_always_only_if_it_does_at_the_last_index(
    bound: Any, lengths: Lengths, expected: bool
) -> None:
    assert never_positive(sympy.expand(bound), lengths) is expected
