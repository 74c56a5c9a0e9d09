"""Which products give what the model returns, and which choose experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.optim.uses import HIDDEN, IDS, X, check_roles, normed

# Name, forward, the shapes of its parameters, what to call it with, roles.
USES = [
    ("logits", lambda m, x: x @ m.a, {"a": (8, 20)}, X, "head"),
    (
        "logits of the last token",
        lambda m, x: F.linear(x[:, -1:], m.a).float(),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "softcapped logits",
        lambda m, x: torch.tanh(F.linear(x, m.a) / 30) * 30,
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "logits and their loss",
        lambda m, x: ((y := F.linear(x, m.a)), F.cross_entropy(y.flatten(0, 1), IDS.view(-1))),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "a loss alone",
        lambda m, x: F.log_softmax(F.linear(x, m.a), -1)[..., 0].mean(),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "a loss by hand",
        lambda m, x: (F.linear(x, m.a) - x).square().mean(),
        {"a": (8, 8)},
        X,
        "head",
    ),
    ("a pooler is no head", lambda m, x: F.linear(x[:, 0], m.a).tanh(), {"a": (8, 8)}, X, HIDDEN),
    ("a residual is no head", lambda m, x: x + F.linear(x, m.a).relu(), {"a": (8, 8)}, X, HIDDEN),
    (
        "values kept for a cache are no logits",
        lambda m, x: (normed(F.scaled_dot_product_attention(x, x, v := F.linear(x, m.a))), v),
        {"a": (8, 8)},
        X,
        HIDDEN,
    ),
    (
        "what is read again is no head",
        lambda m, x: (y := F.linear(x, m.a), normed(F.linear(y.relu(), m.b))),
        {"a": (6, 8), "b": (5, 6)},
        X,
        {"a": HIDDEN, "b": HIDDEN},
    ),
    (
        "a convolution that gives what the model returns",
        lambda m, x: F.conv1d(F.conv1d(x, m.a).relu(), m.b),
        {"a": (6, 5, 3), "b": (4, 6, 1)},
        X,
        {"a": "first convolution", "b": "head"},
    ),
    (
        "experts by choice, and their router",
        lambda m, x: normed(_chosen(m, x)),
        {"a": (4, 8), "b": (4, 6, 8)},
        X,
        {"a": "router", "b": "experts"},
    ),
    (
        "the best of the logits choose no experts",
        lambda m, x: F.linear(x, m.a).topk(2),
        {"a": (20, 8)},
        X,
        HIDDEN,
    ),
]


def _chosen(m: Any, x: Tensor) -> Tensor:
    """A softmax, the two best, and a batched product with the chosen experts' weights."""
    scores, chosen = F.linear(x, m.a).softmax(-1).topk(2)
    made = torch.einsum("bnd,bnkfd->bnkf", x, m.b[chosen])
    return (made * scores[..., None]).sum(2)


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    check_roles(forward, shapes, given, expected)
