"""Masks that come into a graph from outside it: what their values are, and how they are read."""

import itertools

import pytest
import sympy
import torch
from torch import Tensor, fx

from moonfx.passes.symbolic.expressions import is_load
from moonfx.passes.symbolic.input_masks import (
    Given,
    given_of,
    is_frozen,
    mark,
    values_of,
    write_keys,
)
from tests.support.given_masks import (
    HIDDEN,
    ONE_OFF,
    B,
    H,
    N,
    additive,
    causal,
    padded,
    with_padding,
)
from tests.support.reading import AXES, plain_reader, traced

FLIPPED = causal().flip(1)


SPECK = additive(causal())
SPECK[0, 5] = -1e9


# name, mask, what its values are
READ = [
    ("bool", causal(), Given(True, False)),
    ("inverted", ~causal(), Given(False, True)),
    ("additive", additive(causal()), Given(0.0, HIDDEN)),
    ("chunk", causal(10, N), Given(True, False)),
    ("left padding", with_padding("left"), Given(True, False)),
    ("right padding", additive(with_padding("right")), Given(0.0, HIDDEN)),
    ("anti-causal", causal().T.contiguous(), None),
    ("flipped", FLIPPED, None),
    ("one key too many", ONE_OFF, None),
    ("window", causal() & ~causal().tril(-4), None),
    ("all", torch.ones(N, N, dtype=torch.bool), None),
    ("per head", causal().expand(B, H, N, N), None),
    (
        "two values of hidden",
        SPECK,
        None,
    ),
    ("one query", causal(1, N), None),
    ("trained", additive(causal()).requires_grad_(), None),
]


@pytest.mark.parametrize(("mask", "expected"), [r[1:] for r in READ], ids=[r[0] for r in READ])
def test_a_mask_is_read_from_its_values(mask: Tensor, expected: Given | None) -> None:
    assert values_of(mask) == expected


def marked(mask: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    gm = traced(lambda mask, x: mask & (x > 0), mask, torch.ones(N))
    mark(gm, [mask, torch.ones(N, requires_grad=True)])
    return gm, next(iter(gm.graph.nodes))


def test_what_is_noted_on_an_input_are_its_values_and_whether_it_is_trained() -> None:
    _, mask = marked(with_padding("left"))
    x = mask.next
    assert given_of(mask) == Given(True, False)
    assert given_of(x) is None
    assert (is_frozen(mask), is_frozen(x)) == (True, False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_input_mask_is_read_as_causal_and_real_at_every_index(side: str) -> None:
    given = with_padding(side)
    gm, mask = marked(given)
    assert write_keys(mask)
    assert not write_keys(mask), "it is written once"
    gm.graph.lint()
    expr = plain_reader().read(mask, AXES[:4])
    real = padded(side)
    for place in itertools.product(range(B), range(1), range(N), range(N)):
        value = expr.subs(dict(zip(AXES, place, strict=False)))
        value = value.replace(is_load, lambda x: sympy.Integer(int(real[tuple(map(int, x.args))])))
        assert bool(value) == given[place].item(), place


def test_an_input_that_is_no_such_mask_is_written_nothing_for() -> None:
    gm, mask = marked(causal().T.contiguous())
    before = str(gm.graph)
    assert not write_keys(mask)
    assert str(gm.graph) == before
