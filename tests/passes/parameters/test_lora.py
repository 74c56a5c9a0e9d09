"""Two factors are LoRA beside a weight that they correct, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.graph.nodes import aten
from moonfx.passes.parameters.lora import source
from tests.support.optim.uses import HIDDEN, X, check_roles, flow_of, normed

# Name, forward, the shapes of its parameters, what to call it with, roles.
USES = [
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
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    check_roles(forward, shapes, given, expected)


def test_the_source_of_a_value_is_before_views_casts_dropout_and_scales() -> None:
    flow = flow_of(lambda x: F.dropout(x.relu().view(10, 8).double() * 2.0, 0.0), X)
    (relu,) = (v for v in flow.values if v.target is aten.relu.default)
    last = flow.values[-1]
    assert last is not relu
    assert source(last) is relu
    flow = flow_of(lambda x, y: x.relu() * y, X, X)
    product = flow.values[-1]
    assert source(product) is product  # a product of two is no scale
