"""What is normalized, by an operator or by hand: a gain is what scales such a value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.parameters.norms import is_normalized
from tests.support.optim.uses import X, check_roles, flow_of

# Name, forward, the shapes of its parameters, what to call it with, roles.
USES = [
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
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    check_roles(forward, shapes, given, expected)


# Name, what is made of x, and whether it is normalized.
VALUES: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
    ("layer norm", lambda x: F.layer_norm(x, [8]), True),
    ("RMS norm by hand", lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(), True),
    ("divided by a norm", lambda x: x / x.norm(dim=-1, keepdim=True), True),
    ("divided by a root", lambda x: x / (x.var(-1, keepdim=True) + 1e-5).sqrt(), True),
    ("a norm, viewed and shifted", lambda x: F.rms_norm(x, [8]).flatten(1) + 1.0, True),
    ("less its mean", lambda x: x - x.mean(-1, keepdim=True), False),
    ("divided by its sum", lambda x: x / x.sum(-1, keepdim=True), False),
    ("an activation of a norm", lambda x: F.layer_norm(x, [8]).relu(), False),
    ("given", lambda x: x * 1.0, False),
]


@pytest.mark.parametrize(
    ("made", "normalized"), [v[1:] for v in VALUES], ids=[v[0] for v in VALUES]
)
def test_a_value_is_normalized_where_a_root_of_squares_divides_it(
    made: Callable[[Tensor], Tensor], normalized: bool
) -> None:
    assert is_normalized(flow_of(made, X).values[-1]) == normalized
