"""What a rule takes of a node's operands, and what it will not take."""

from typing import Any

import pytest
import torch
from torch import fx

from moonfx.passes.newton_schulz.operands import (
    TooLong,
    Unclear,
    alike,
    named,
    number,
    overloads,
    shape,
    size,
    times,
)

aten = torch.ops.aten


def node(*sizes: int) -> fx.Node:
    made = fx.Graph().placeholder("x")
    made.meta["val"] = torch.zeros(sizes)
    return made


def test_operands_are_as_wide_and_as_tall_as_what_is_made_of_them() -> None:
    alike(node(3, 4, 6), node(3, 4, 6), node(4, 6), node(1, 4, 6))
    for other in (node(1, 6), node(4, 1), node(6, 4), node(6)):
        with pytest.raises(Unclear, match="a row or column is broadcast over a matrix"):
            alike(node(3, 4, 6), other)
    with pytest.raises(Unclear, match="a number is added to every entry"):
        alike(node(4, 6), 1.0)


@pytest.mark.parametrize(("value", "found"), [(2, 2.0), (-0.5, -0.5)])
def test_a_coefficient_is_a_number_of_the_graph(value: Any, found: float) -> None:
    assert number(value) == found


def test_no_tensor_flag_or_symbol_is_a_coefficient() -> None:
    with pytest.raises(Unclear, match="a coefficient is a tensor"):
        number(node())
    symbol = fx.Graph().placeholder("lr")
    for value in (True, None, symbol):
        with pytest.raises(Unclear, match="is not known when the graph is compiled"):
            number(value)


def test_sizes_are_of_tensors_alone() -> None:
    assert (shape(node(2, 3)), size(node(2, 3))) == ([2, 3], 6)
    symbol = fx.Graph().placeholder("lr")
    assert (shape(symbol), size(symbol)) == ([], 0)


def test_a_product_that_is_too_long_stops_the_rule() -> None:
    assert times({"X": 2.0}, {"TX": 3.0}) == {"XTX": 6.0}
    with pytest.raises(TooLong):
        times({"XTX": 1.0}, {"XTX": 1.0})


def test_a_rule_is_for_the_in_place_and_the_out_form_where_torch_has_them() -> None:
    def rule(*given: Any) -> Any:
        return {}

    found = overloads("add.Tensor matmul.default", rule)
    assert set(found) == {
        *(aten.add.Tensor, aten.add_.Tensor, aten.add.out),
        *(aten.matmul.default, aten.matmul.out),
    }
    assert set(named("mT.default no_such_operator.default", rule)) == {aten.mT.default}
