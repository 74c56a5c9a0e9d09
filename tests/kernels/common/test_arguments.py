"""The arguments that every kernel is given, in the operator's order and with its defaults."""

import pytest
import torch

import moonfx.ops.moba  # noqa: F401  (registers the operator)
from moonfx.kernels.common.arguments import MobaArguments


def test_the_operator_has_these_arguments_in_this_order_with_these_defaults() -> None:
    schema = torch.ops.moonfx.moba_attention.default._schema
    given = {a.name: a for a in schema.arguments}
    names = list(given)
    assert names[:3] == ["query", "key", "value"]
    assert names[3 : 3 + len(MobaArguments._fields)] == list(MobaArguments._fields)
    for name, default in MobaArguments._field_defaults.items():
        assert given[name].default_value == default, name


@pytest.mark.parametrize(("scale", "found"), [(None, 0.125), (0.5, 0.5), (0.0, 0.0), (-1.0, -1.0)])
def test_a_scale_is_as_given_and_else_that_of_the_head_dim(
    scale: float | None, found: float
) -> None:
    assert MobaArguments(8, 2, scale=scale).scale_for(64) == found


def test_numbers_and_tensors_are_parted_and_make_the_arguments_again() -> None:
    mask, bias = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 1, 8)
    arguments = MobaArguments(8, 2, sinks=1, key_mask=mask, key_bias=bias)
    numbers, tensors = arguments.split()
    assert tensors == {"key_mask": mask, "key_bias": bias}
    assert numbers["segments"] is None
    again = MobaArguments(**numbers, **tensors)
    assert all(a is b or a == b for a, b in zip(again, arguments, strict=True))
