"""Heads of distributions: what gives the parameters of what is drawn, and no weight follows.

Each row: the form, the model, what to call it with, and the role of each parameter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.optim.uses import HIDDEN, Use, X, rows


def drawn(distribution: torch.distributions.Distribution) -> tuple[Tensor, Tensor]:
    """An action, and how likely it was."""
    action = distribution.rsample() if distribution.has_rsample else distribution.sample()
    return action, distribution.log_prob(action)


def squashed(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    before = mean + deviation * torch.randn_like(mean)
    likely = -(((before - mean) / deviation) ** 2) / 2 - deviation.log()
    return before.tanh(), likely - (1 - before.tanh() ** 2 + 1e-6).log()


DISTRIBUTIONS = [
    # name, forward, shapes, what to call it with, roles
    (
        "mean and deviation, drawn from",
        lambda m, x: drawn(torch.distributions.Normal(F.linear(x, m.a), F.linear(x, m.b).exp())),
        {"a": (3, 8), "b": (3, 8)},
        X,
        {"a": "head", "b": "head"},
    ),
    (
        "mean and deviation, given as a distribution",
        lambda m, x: torch.distributions.Normal(F.linear(x, m.a), F.softplus(F.linear(x, m.b))),
        {"a": (3, 8), "b": (3, 8)},
        X,
        {"a": "head", "b": "head"},
    ),
    (
        "choices, drawn from",
        lambda m, x: drawn(torch.distributions.Categorical(logits=F.linear(x, m.a))),
        {"a": (6, 8)},
        X,
        "head",
    ),
    (
        "a squashed action and its probability, by hand",
        lambda m, x: squashed(F.linear(x, m.a), F.linear(x, m.b).clamp(-5, 2).exp()),
        {"a": (3, 8), "b": (3, 8)},
        X,
        {"a": "head", "b": "head"},
    ),
    (
        "the log of a rate",
        lambda m, x: F.linear(x, m.a).exp(),
        {"a": (3, 8)},
        X,
        "head",
    ),
    (
        "what is drawn of is decoded: no head",
        lambda m, x: F.linear(F.linear(x, m.a) + F.linear(x, m.b).exp() * torch.randn(3), m.c),
        {"a": (3, 8), "b": (3, 8), "c": (5, 3)},
        X,
        {"a": HIDDEN, "b": HIDDEN, "c": "head"},
    ),
    (
        "a residual that dropout or a dropped path ends: no head",
        lambda m, x: x + F.linear(x, m.a).relu() * torch.empty(2, 1, 1).bernoulli_(0.9) / 0.9,
        {"a": (8, 8)},
        X,
        HIDDEN,
    ),
    (
        "a body that ends in attention: no head",
        lambda m, x: x + F.scaled_dot_product_attention(x, x, F.linear(x, m.a), dropout_p=0.1),
        {"a": (8, 8)},
        X,
        HIDDEN,
    ),
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"),
    [r[1:] for r in DISTRIBUTIONS],
    ids=[r[0] for r in DISTRIBUTIONS],
)
def test_what_gives_the_parameters_of_a_distribution_is_a_head(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    found = rows(Use(forward, **shapes), given)
    expected = {"a": expected} if isinstance(expected, str) else expected
    assert {name: row.role for name, row in found.items()} == expected
