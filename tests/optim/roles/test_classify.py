"""What a model must own, and bad input."""

from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.roles.classify import classify
from tests.support.optim.roles import (
    small,
)


def test_a_model_that_does_not_own_a_parameter_is_an_error_that_says_which() -> None:
    model, strange = small(), nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"does not own 1 of the .* 2 parameters: x \[3, 5\]"):
        classify([model.out.weight, strange], ["", "x"], model)  # type: ignore[list-item]


def test_shards_that_the_model_does_not_own_are_explained() -> None:
    flat = [nn.Parameter(torch.zeros(64))]
    with pytest.raises(ValueError, match="flattened shard .* use FSDP2"):
        classify(flat, [""], small())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, "model must be a torch.nn.Module or None, got str"),
        ({"example": torch.zeros(1)}, TypeError, "example must be a tuple of positional or a dict"),
        ({"example": ()}, ValueError, "example needs model="),
    ],
)
def test_bad_input_is_one_clear_error(given: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        classify([nn.Parameter(torch.zeros(2, 2))], [""], **given)
