"""Bad input of a classification."""

from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.roles.classify import classify


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
