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

from moonfx.optim.roles.table import ROLES
from tests.support.optim.uses import HIDDEN, IDS, Use, X, normed, rows

USES = [
    # name, forward, the shapes of its parameters, what to call it with, roles
    # --- tables -----------------------------------------------------------------------------------
    ("embedding", lambda m, i: normed(F.embedding(i, m.a)), {"a": (20, 8)}, IDS, "embedding"),
    ("gathered by index", lambda m, i: normed(m.a[i]), {"a": (20, 8)}, IDS, "embedding"),
    (
        "gathered by rows",
        lambda m, i: normed(m.a.index_select(0, i[0])),
        {"a": (20, 8)},
        IDS,
        "embedding",
    ),
    (
        "positions",
        lambda m, x: normed(x + F.embedding(torch.arange(x.shape[1]), m.a)),
        {"a": (20, 8)},
        X,
        "position embedding",
    ),
    (
        "positions of what is not padding",
        lambda m, i: normed(F.embedding((i != 0).cumsum(1), m.a)),
        {"a": (20, 8)},
        IDS,
        "position embedding",
    ),
    (
        "positions, added",
        lambda m, x: normed(x + m.a[:, :5]),
        {"a": (1, 9, 8)},
        X,
        "position embedding",
    ),
    (
        "tokens at an offset, which is no position",
        lambda m, i: normed(F.embedding(i + 10 * torch.arange(2)[:, None], m.a)),
        {"a": (20, 8)},
        IDS,
        "embedding",
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
        "tied head",
        lambda m, i: F.linear(normed(F.embedding(i, m.a)), m.a),
        {"a": (20, 8)},
        IDS,
        "tied head",
    ),
    # --- vectors ----------------------------------------------------------------------------------
    (
        "layer norm",
        lambda m, x: F.layer_norm(x, [8], m.a, m.b),
        {"a": (8,), "b": (8,)},
        X,
        {"a": "norm gain", "b": "bias"},
    ),
    ("RMS norm", lambda m, x: F.rms_norm(x, [8], m.a), {"a": (8,)}, X, "norm gain"),
    (
        "RMS norm by hand, from zero",
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + m.a),
        {"a": (8,)},
        X,
        "norm gain",
    ),
    ("a scale that is no gain", lambda m, x: x.relu() * m.a, {"a": (8,)}, X, "vector"),
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
    (
        "LoRA",
        lambda m, x: normed(F.linear(x, m.a) + 0.5 * F.linear(F.linear(F.dropout(x), m.b), m.c)),
        {"a": (6, 8), "b": (2, 8), "c": (6, 2)},
        X,
        {"a": HIDDEN, "b": "LoRA", "c": "LoRA"},
    ),
    (
        "a bottleneck is no LoRA",
        lambda m, x: normed(x + F.linear(F.linear(x, m.b), m.c)),
        {"b": (2, 8), "c": (8, 2)},
        X,
        {"b": HIDDEN, "c": HIDDEN},
    ),
    (
        "two layers beside one are no LoRA",
        lambda m, x: normed(F.linear(x, m.a) + F.linear(F.linear(x, m.b).relu(), m.c)),
        {"a": (6, 8), "b": (2, 8), "c": (6, 2)},
        X,
        {"a": HIDDEN, "b": HIDDEN, "c": HIDDEN},
    ),
    (
        "two wide layers beside one are no LoRA",
        lambda m, x: normed(F.linear(x, m.a) + F.linear(F.linear(x, m.b), m.c)),
        {"a": (6, 8), "b": (8, 8), "c": (6, 8)},
        X,
        {"a": HIDDEN, "b": HIDDEN, "c": HIDDEN},
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
    (
        "a convolution that gives what the model returns",
        lambda m, x: F.conv1d(F.conv1d(x, m.a).relu(), m.b),
        {"a": (6, 5, 3), "b": (4, 6, 1)},
        X,
        {"a": "first convolution", "b": "head"},
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


def _chosen(m: Any, x: Tensor) -> Tensor:
    """A softmax, the two best, and a batched product with the chosen experts' weights."""
    scores, chosen = F.linear(x, m.a).softmax(-1).topk(2)
    made = torch.einsum("bnd,bnkfd->bnkf", x, m.b[chosen])
    return (made * scores[..., None]).sum(2)


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
    found = rows(Use(forward, **shapes), given)
    expected = {"a": expected} if isinstance(expected, str) else expected
    assert {name: row.role for name, row in found.items()} == expected
    for row in found.values():
        assert row.rule == "graph"
        assert row.optimizer == ROLES[row.role].optimizer
