"""Roles by use: what the traced model does with each parameter, whatever it is called.

Each row: the form, the model, what to call it with, and the role of each parameter. Names are those
of the form alone (`a`, `b`): no rule by name or module type could give these answers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.optim.uses import HIDDEN, IDS, X, check_roles, normed

USES = [
    # name, forward, the shapes of its parameters, what to call it with, roles
    # --- tables -----------------------------------------------------------------------------------
    (
        "positions, added",
        lambda m, x: normed(x + m.a[:, :5]),
        {"a": (1, 9, 8)},
        X,
        "position embedding",
    ),
    (
        "learned rows",
        lambda m, x: normed(torch.cat([m.a.expand(2, 3, 8), x], 1)),
        {"a": (3, 8)},
        X,
        "embedding",
    ),
    (
        "a class token",
        lambda m, x: normed(torch.cat([m.a.expand(2, 1, 8), x], 1)),
        {"a": (1, 1, 8)},
        X,
        "vector",
    ),
    # --- heads ------------------------------------------------------------------------------------
    (
        "tied head",
        lambda m, i: F.linear(normed(F.embedding(i, m.a)), m.a),
        {"a": (20, 8)},
        IDS,
        "tied head",
    ),
    # --- vectors ----------------------------------------------------------------------------------
    ("a temperature", lambda m, x: normed(x) * m.a.exp(), {"a": ()}, X, "vector"),
    ("bias", lambda m, x: normed(x + m.a), {"a": (8,)}, X, "bias"),
    (
        "bias of a linear",
        lambda m, x: normed(F.linear(x, m.a, m.b)),
        {"a": (6, 8), "b": (6,)},
        X,
        {"a": HIDDEN, "b": "bias"},
    ),
    # --- matrices ---------------------------------------------------------------------------------
    (
        "thin matrix",
        lambda m, x: normed(F.linear(x, m.a).sigmoid() * F.linear(x, m.b)),
        {"a": (1, 8), "b": (6, 8)},
        X,
        {"a": "thin matrix", "b": HIDDEN},
    ),
    (
        "weight norm by hand",
        lambda m, x: normed(F.linear(x, m.a * m.b / m.b.norm(dim=1, keepdim=True))),
        {"a": (6, 1), "b": (6, 8)},
        X,
        {"a": "weight norm", "b": "weight norm"},
    ),
    # --- convolutions -----------------------------------------------------------------------------
    (
        "convolutions",
        lambda m, x: normed(F.conv1d(F.conv1d(F.conv1d(x, m.a).relu(), m.b, groups=6), m.c)),
        {"a": (6, 5, 1), "b": (6, 1, 3), "c": (4, 6, 2)},
        X,
        {"a": "first convolution", "b": "depthwise convolution", "c": "convolution"},
    ),
    (
        "a convolution of embeddings is not the first",
        lambda m, i: normed(F.conv1d(F.embedding(i, m.a), m.b)),
        {"a": (20, 8), "b": (6, 5, 3)},
        IDS,
        {"a": "embedding", "b": "convolution"},
    ),
    # --- experts ----------------------------------------------------------------------------------
    ("experts by bmm", lambda m, x: normed(x @ m.a), {"a": (2, 8, 6)}, X, "experts"),
    (
        "experts by einsum",
        lambda m, x: normed(torch.einsum("bnd,bfd->bnf", x, m.a)),
        {"a": (2, 6, 8)},
        X,
        "experts",
    ),
    (
        "experts one by one",
        lambda m, x: normed(F.linear(x[0], m.a[0]) + F.linear(x[1], m.a[1])),
        {"a": (2, 6, 8)},
        X,
        "experts",
    ),
    (
        "one matrix in three dimensions",
        lambda m, x: normed(torch.einsum("bnd,dhe->bnhe", x, m.a)),
        {"a": (8, 2, 3)},
        X,
        HIDDEN,
    ),
    # --- recurrences ------------------------------------------------------------------------------
    (
        "a state-space scan",
        lambda m, x: normed(_scan(m, x) + x * m.c),
        {"a": (8,), "b": (8,), "c": (8,)},
        X,
        {"a": "scan parameter", "b": "scan parameter", "c": "scan parameter"},
    ),
    (
        "an exponential that is no decay",
        lambda m, x: x.relu() * m.a.exp(),
        {"a": (8,)},
        X,
        "vector",
    ),
    # --- what is not seen -------------------------------------------------------------------------
    (
        "unused",
        lambda m, x: normed(F.linear(x, m.a)),
        {"a": (6, 8), "b": (6, 8)},
        X,
        {"a": HIDDEN, "b": "unused"},
    ),
]


def _scan(m: Any, x: Tensor) -> Tensor:
    step = F.softplus(x + m.b)
    decay = torch.exp(-torch.exp(m.a) * step)
    state = x[:, 0]
    for i in range(x.shape[1]):
        state = decay[:, i] * state + step[:, i] * x[:, i]
    return state[:, None]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    check_roles(forward, shapes, given, expected)
