"""Learned queries: rows that no input gives, and the matrices that act on them.

Each row: the form, what it makes of the input with parameters of one letter, and their roles.
Beside the forms in which weights alone are activations stand those in which they make a weight.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from tests.support.optim.uses import HIDDEN, IDS, Use, X, normed, rows

ROWS, TABLE = "embedding", "position embedding"
SQUARE = {"q": (3, 8), "w": (8, 8)}


def attended(q: Tensor, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.expand(len(x), *q.shape[-2:]), x, x)


def by_hand(q: Tensor, x: Tensor) -> Tensor:
    scores = q.expand(len(x), -1, -1) @ x.transpose(1, 2) * 8**-0.5
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ x


def memory(m: Any, x: Tensor) -> Tensor:
    """Keys and values that are learned, by attention by hand."""
    k, v = ((m.q @ w).expand(2, -1, -1) for w in (m.w, m.v))
    return (x @ k.transpose(1, 2)).softmax(-1) @ v


def norm_by_hand(m: Any, x: Tensor) -> Tensor:
    q = m.q * torch.rsqrt(m.q.square().mean(-1, keepdim=True) + 1e-6) * m.g
    return attended(F.linear(q, m.w), x)


FORMS = [
    # name, forward, shapes, input, roles
    ("queries", lambda m, x: normed(attended(F.linear(m.q, m.w), x)), SQUARE, X, [ROWS, HIDDEN]),
    ("queries by @", lambda m, x: normed(attended(m.q @ m.w, x)), SQUARE, X, [ROWS, HIDDEN]),
    (
        "attention by hand",
        lambda m, x: normed(by_hand(F.linear(m.q, m.w), x)),
        SQUARE,
        X,
        [ROWS, HIDDEN],
    ),
    (
        "keys and values",
        lambda m, x: normed(memory(m, x)),
        {**SQUARE, "v": (8, 8)},
        X,
        [ROWS, HIDDEN, HIDDEN],
    ),
    (
        "after a norm",
        lambda m, x: normed(attended(F.linear(F.layer_norm(m.q, [8], m.g, m.b), m.w), x)),
        {**SQUARE, "g": (8,), "b": (8,)},
        X,
        [ROWS, HIDDEN, "norm gain", "bias"],
    ),
    (
        "after a norm by hand",
        lambda m, x: normed(norm_by_hand(m, x)),
        {**SQUARE, "g": (8,)},
        X,
        [ROWS, HIDDEN, "norm gain"],
    ),
    (
        "through an MLP, added",
        lambda m, x: normed(x + F.linear(F.linear(m.q, m.w).relu(), m.v)[:1]),
        {**SQUARE, "v": (8, 8)},
        X,
        [ROWS, HIDDEN, HIDDEN],
    ),
    (
        "a table of tokens through a matrix",
        lambda m, i: normed(F.embedding(i, m.q @ m.w)),
        {"q": (20, 8), "w": (8, 8)},
        IDS,
        [ROWS, HIDDEN],
    ),
    (
        "joined with tokens",
        lambda m, x: normed(torch.cat([F.linear(m.q, m.w).expand(2, 3, 8), x], 1)),
        SQUARE,
        X,
        [ROWS, HIDDEN],
    ),
    ("queries without a matrix", lambda m, x: normed(attended(m.q, x)), {"q": (3, 8)}, X, [ROWS]),
    # --- a weight that is computed ----------------------------------------------------------------
    (
        "a weight of two factors",
        lambda m, x: normed(F.linear(x, m.q.t() @ m.q)),
        {"q": (3, 8)},
        X,
        ["unclear"],
    ),
    (
        "weight norm",
        lambda m, x: normed(F.linear(x, m.g * m.w / m.w.norm(dim=1, keepdim=True))),
        {"g": (8, 1), "w": (8, 8)},
        X,
        ["weight norm", "weight norm"],
    ),
    (
        "LoRA, merged in a table",
        lambda m, i: normed(F.embedding(i, m.e + m.b @ m.a)),
        {"e": (20, 8), "b": (20, 2), "a": (2, 8)},
        IDS,
        [ROWS, ROWS, ROWS],
    ),
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in FORMS], ids=[r[0] for r in FORMS]
)
def test_rows_that_are_learned_are_a_table_and_what_acts_on_them_is_a_matrix(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: list[str]
) -> None:
    found = rows(Use(forward, **shapes), given)
    assert {name: row.role for name, row in found.items()} == dict(
        zip(shapes, expected, strict=True)
    )


class Decoder(nn.Module):
    """Learned queries before nn.TransformerDecoder, whose first layer no input reaches at first."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.q, self.decoder = nn.Embedding(3, 8), nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.q.weight.expand(len(x), -1, -1), x)


class Detr(nn.Module):
    """Zeros to which learned queries are added; attention that gives its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Embedding(3, 8)
        self.own, self.cross = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        at = self.q.weight[None].expand(len(x), -1, -1)
        y = torch.zeros_like(at)
        y = self.norm(y + self.own(y + at, y + at, y)[0])
        return self.last(y + self.cross(y + at, x, x)[0])


@pytest.mark.parametrize("model", [Decoder(), Detr()], ids=["nn.TransformerDecoder", "DETR"])
def test_the_projections_of_learned_queries_are_those_of_any_other(model: nn.Module) -> None:
    found = rows(model)
    expected = {
        "in_proj_weight": ("fused projection", Layout(sizes=(8, 8, 8))),
        "out_proj.weight": (HIDDEN, Layout()),
        "in_proj_bias": ("bias", Layout()),
    }
    for name, row in found.items():
        assert row.rule == "graph"
        for end, (role, layout) in expected.items():
            if name.endswith(end):
                assert (row.role, row.layout) == (role, layout), name
    assert found["q.weight"].optimizer == "adamw"
