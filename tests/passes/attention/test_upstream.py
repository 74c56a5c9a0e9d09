"""Constants, scalars and products above the scores: read where they are proved, else not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.passes.attention.upstream import (
    constant_of,
    is_scalar,
    product_above,
    reaches_product,
)
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import operator_name
from tests.passes.attention.forms import B, N, captured, result

Made = Callable[[Tensor], Tensor]

# Name, a tensor of the graph, and the one number that it holds whatever is given.
CONSTANTS: list[tuple[str, Made, float | None]] = [
    ("a filled scalar", lambda x: torch.full((), 2.5), 2.5),
    ("a filled tensor", lambda x: torch.full((2, 3), -torch.inf), -torch.inf),
    ("arithmetic of constants", lambda x: torch.ones(3) * 4 - 1, 3.0),
    ("an input", lambda x: x.mean(), None),
    ("different values", lambda x: torch.arange(3), None),
    ("NaN", lambda x: torch.full((), torch.nan), None),
    ("plus an input", lambda x: x + 1, None),
]


@pytest.mark.parametrize(
    ("made", "value"), [c[1:] for c in CONSTANTS], ids=[c[0] for c in CONSTANTS]
)
def test_only_what_the_graph_itself_fixes_is_a_constant(made: Made, value: float | None) -> None:
    gm = captured(made, (torch.ones(2),))
    assert constant_of(result(gm), Context(gm, lambda *site: "dense")) == value


@pytest.mark.parametrize(("given", "value"), [(3, 3.0), (0.5, 0.5), (True, None), (None, None)])
def test_a_number_is_itself_and_a_flag_is_none(given: Any, value: float | None) -> None:
    context = Context(captured(lambda x: x, (torch.ones(2),)), lambda *site: "dense")
    assert constant_of(given, context) == value


def test_a_tensor_of_one_number_is_a_scalar_and_one_of_a_dim_is_none() -> None:
    assert is_scalar(result(captured(lambda x: x.mean(), (torch.ones(2),))))
    assert not is_scalar(result(captured(lambda x: x[:1], (torch.ones(2),))))


# Name, what is made of x [B, N, N], whether scores are, and the product above it.
ABOVE: list[tuple[str, Made, bool, str | None]] = [
    ("scores", lambda x: (x @ x.mT * 0.5).tanh() + 1.0, True, "matmul"),
    ("bmm", lambda x: torch.bmm(x, x).masked_fill(x > 0, -1.0), True, "bmm"),
    ("of the product's sum", lambda x: x - (x @ x.mT).sum(-1, keepdim=True), False, "matmul"),
    ("a distance", lambda x: torch.cdist(x, x) * 2, False, "cdist"),
    ("a product of matrices", lambda x: x[0] @ x[0], False, "matmul"),
    ("no product", lambda x: x * x + 1, False, None),
]


@pytest.mark.parametrize(
    ("made", "reaches", "above"), [a[1:] for a in ABOVE], ids=[a[0] for a in ABOVE]
)
def test_scores_are_a_product_and_what_elementwise_operators_make_of_it(
    made: Made, reaches: bool, above: str | None
) -> None:
    node = result(captured(made, (torch.ones(B, N, N),)))
    assert reaches_product(node) == reaches
    found = product_above(node)
    assert (None if found is None else operator_name(found)) == above
