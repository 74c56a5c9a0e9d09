"""Masks that come into a graph from outside it: what their values are, and how they are read."""

import pytest
import torch
from torch import Tensor

from moonfx.passes.symbolic.input_masks import Given, values_of
from tests.support.given_masks import HIDDEN, ONE_OFF, B, H, N, additive, causal, with_padding

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
