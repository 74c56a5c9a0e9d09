"""One value of the data flow: its operator, its arguments by name, its sizes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.parameters.dataflow import (
    INPUT,
    FlowValue,
)
from moonfx.passes.parameters.values import (
    argument_name,
    is_float,
    named_argument,
    op_name,
    wide_sizes,
)
from tests.support.optim.uses import IDS, X, flow_of


def last(body: Callable[..., Tensor], *inputs: Tensor) -> FlowValue:
    return flow_of(body, *inputs).values[-1]


def test_an_operator_has_one_name_in_place_and_out_of_place() -> None:
    assert (
        op_name(last(lambda x: x + 1, X)) == op_name(last(lambda x: x.clone().add_(1), X)) == "add"
    )
    assert op_name(last(lambda x: x.pow(2), X)) == "pow"
    assert op_name(flow_of(lambda x: x + 1, X).values[0]) == INPUT


def test_arguments_are_named_as_the_schema_has_them() -> None:
    value = last(lambda x, w: F.layer_norm(x, [8], None, w), X, torch.ones(8))
    x, w = (v for v in value.reads)
    assert (argument_name(value, x), argument_name(value, w)) == ("input", "bias")
    assert named_argument(value, "normalized_shape", None) == [8]
    assert named_argument(value, "eps", 7.0) in (1e-5, 7.0)
    assert argument_name(value, value) == ""
    joined = last(lambda x: torch.cat([x, x]), X)
    assert argument_name(joined, joined.reads[0]) == ""  # in a list, and no argument by itself


def test_sizes_of_one_are_left_out_and_whole_numbers_are_no_floats() -> None:
    value = last(lambda x: x[:1, :, None] * 2, X)
    assert wide_sizes(value) == [5, 8]
    assert is_float(value)
    assert not is_float(last(lambda x: x * 2, IDS))
