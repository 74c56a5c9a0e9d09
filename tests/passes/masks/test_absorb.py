"""Redundant parts of a condition, and planes of a finite minimum that are added."""

import itertools
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moonfx.passes.masks.absorb import conjunction, is_impossible
from moonfx.passes.symbolic.expressions import load_symbol
from moonfx.passes.symbolic.indices import BATCH, KEY, QUERY
from tests.passes.attention.forms import NEG, Model, N, causal, inputs, outcome, run
from tests.passes.masks.traced_masks import PADDED, B, columns, real_keys, rows, trace, verdict

REAL = load_symbol("real")(BATCH, KEY)
LATER, PADDING, THIRD = KEY > QUERY, sympy.Eq(REAL, 0), KEY > 5
PARTS = [LATER, PADDING, THIRD]

Expr = sympy.logic.boolalg.Boolean

CONDITIONS: list[tuple[str, Expr, set[Expr]]] = [
    ("both or one", ~(LATER & PADDING) & ~(LATER | PADDING), {KEY <= QUERY, sympy.Ne(REAL, 0)}),
    ("in each branch", (LATER & PADDING) | (LATER & THIRD), {LATER, PADDING | THIRD}),
    ("said again", LATER & (LATER | PADDING), {LATER}),
    ("excluded", ~LATER & (LATER | PADDING), {KEY <= QUERY, PADDING}),
    ("the negation, turned", (QUERY >= KEY) & ((QUERY < KEY) | PADDING), {QUERY >= KEY, PADDING}),
    ("shifted by one", (KEY < QUERY + 1) & (LATER | PADDING), {KEY < QUERY + 1, PADDING}),
    ("first or not first and", LATER | (~LATER & PADDING), {LATER | PADDING}),
    ("either way", (LATER & PADDING) | (~LATER & PADDING), {PADDING}),
    ("never", LATER & ~LATER & (PADDING | THIRD), {sympy.false}),
    ("nothing to absorb", LATER | PADDING, {LATER | PADDING}),
]


@pytest.mark.parametrize(
    ("condition", "expected"), [c[1:] for c in CONDITIONS], ids=[c[0] for c in CONDITIONS]
)
def test_a_condition_loses_what_the_rest_of_it_says(condition: Expr, expected: set[Expr]) -> None:
    assert set(conjunction([condition], lambda relation: False)) == expected


def test_a_part_that_holds_at_every_index_decides_what_it_stands_in() -> None:
    always = KEY < 5
    whole = (always & LATER) | (~always & PADDING)
    assert conjunction([whole], lambda relation: relation == always) == [LATER]


CONDITION = st.recursive(
    st.sampled_from(PARTS),
    lambda inner: st.one_of(
        st.builds(sympy.And, inner, inner),
        st.builds(sympy.Or, inner, inner),
        st.builds(sympy.Not, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(whole=CONDITION)
def test_what_is_left_holds_where_the_condition_does(whole: Expr) -> None:
    left = sympy.And(*conjunction([whole], lambda relation: False))
    places = list(itertools.product((0, 7), (0, 3, 6, 7), (0, 1)))
    held = []
    for query, key, real in places:
        at = {QUERY: query, KEY: key, REAL: real}
        held.append(bool(whole.subs(at)))
        assert held[-1] == bool(left.subs(at))
    assert not (is_impossible(whole) and any(held))


Plane = Callable[..., Tensor]
LATER_PLANES: dict[str, Plane] = {
    "triu": lambda n, v: torch.full((n, n), v).triu(1),
    "where": lambda n, v: torch.where(columns(n) <= rows(n), 0.0, v),
    "masked_fill": lambda n, v: torch.zeros(n, n).masked_fill(columns(n) > rows(n), v),
    "times": lambda n, v: (1 - torch.ones(n, n).tril()) * v,
}
PADDING_PLANES: dict[str, Plane] = {
    "masked_fill": lambda m, v: torch.zeros(m.shape)[:, None, None].masked_fill(~real_keys(m), v),
    "where": lambda m, v: torch.where(real_keys(m), 0.0, v),
    "times": lambda m, v: (1 - m[:, None, None].float()) * v,
}
SPELLINGS = [
    (later, padding, value)
    for later, padding in itertools.product(LATER_PLANES, PADDING_PLANES)
    for value in (NEG, -1e9, -torch.inf)
    if not (value == -torch.inf and "times" in (later, padding))  # 0 * inf is NaN
]


@pytest.mark.parametrize(("later", "padding", "value"), SPELLINGS)
def test_two_planes_that_are_added_are_causal_and_padding(later, padding, value) -> None:
    def mask(n: int, k: int, real: Tensor) -> Tensor:
        return LATER_PLANES[later](n, value) + PADDING_PLANES[padding](real, value)

    assert verdict(trace(mask, 12, 12, dynamic=True, padding=True)) == PADDED


def planes(n: int, real: Tensor, value: float = NEG) -> tuple[Tensor, Tensor]:
    return LATER_PLANES["triu"](n, value), PADDING_PLANES["masked_fill"](real, value)


# How two planes of a minimum may become one mask, and what it is then.
JOINS: list[tuple[str, Callable[[Tensor, Tensor], Tensor], str]] = [
    ("clamped", lambda a, b: (a + b).clamp(min=NEG), PADDED),
    ("the lower", torch.minimum, PADDED),
    ("where it is below 0", lambda a, b: torch.where(a + b < 0, NEG, 0.0), PADDED),
    ("twice", lambda a, b: a + b + a, PADDED),
    ("the higher", torch.maximum, "prefix-LM"),
    ("where both are below 0", lambda a, b: torch.where((a < 0) & (b < 0), NEG, 0.0), "prefix-LM"),
    ("the difference", lambda a, b: a - b, "additive bias"),
]


@pytest.mark.parametrize(("join", "expected"), [j[1:] for j in JOINS], ids=[j[0] for j in JOINS])
def test_planes_hide_what_either_hides_only_where_they_are_joined_so(join, expected) -> None:
    def mask(n: int, k: int, real: Tensor) -> Tensor:
        return join(*planes(n, real))

    assert verdict(trace(mask, 12, 12, dynamic=False, padding=True)).startswith(expected)


def test_planes_that_hide_only_together_are_no_mask() -> None:
    """-6e3 is outweighed by a large score, -1.2e4 is not."""

    def mask(n: int, k: int, real: Tensor) -> Tensor:
        later, padding = planes(n, real, -6e3)
        return later + padding

    got = verdict(trace(mask, 12, 12, dynamic=False, padding=True))
    assert got.startswith("additive bias: relative position bias")


@pytest.mark.parametrize("value", [NEG, -1e9])
def test_added_planes_compute_what_dense_attention_does(value: float) -> None:
    """Keys hidden by both planes overflow to -inf under the minimum, and to -2e9: hidden alike."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        later, padding = planes(N, real, value)
        return F.scaled_dot_product_attention(q, k, v, later + padding)

    real = torch.ones(B, N, dtype=torch.long)
    real[1, :7] = 0
    keep = causal() & real_keys(real)
    expected = F.scaled_dot_product_attention(*inputs(), keep)
    seen = keep.any(-1)[..., None]  # rows of padding see no key, and nobody reads them
    out, report = run(Model(body), *inputs(), real)
    assert outcome(report) == [PADDED]
    torch.testing.assert_close(out * seen, expected.nan_to_num() * seen, atol=2e-6, rtol=1e-5)
