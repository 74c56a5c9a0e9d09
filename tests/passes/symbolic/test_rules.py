"""The table of operators: each under one rule, and in place what it is out of place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moonfx.passes.symbolic import rules
from moonfx.passes.symbolic.rules import RULES, VIEWS
from tests.support.reading import assert_read_exactly

aten = torch.ops.aten


def test_no_operator_stands_under_two_rules() -> None:
    """The later of two would count, wherever it stands."""
    names = [n for _, names in (*rules._OPERATORS, *rules._IN_PLACE) for n in names]
    assert sorted(names) == sorted(set(names))


def test_a_view_moves_elements_and_computes_nothing() -> None:
    assert RULES.keys() >= VIEWS
    assert {aten.slice.Tensor, aten.expand.default, aten.transpose.int} <= VIEWS
    assert not VIEWS & {aten.cat.default, aten.index.Tensor, aten.add.Tensor, aten.to.dtype}


def positions() -> Tensor:
    return torch.arange(4) - 1


def causal() -> Tensor:
    return torch.ones(4, 4, dtype=torch.bool).tril()


IN_PLACE: list[tuple[str, Callable[[], Tensor]]] = [
    ("fill_", lambda: torch.zeros(3).fill_(2.5)),
    ("fill_ by a tensor", lambda: torch.zeros(3).fill_(torch.tensor(4.0))),
    ("zero_", lambda: torch.ones(3).zero_()),
    ("add_", lambda: positions().add_(positions())),
    ("sub_", lambda: positions().sub_(3)),
    ("mul_", lambda: positions().mul_(-2)),
    ("div_", lambda: torch.full((3,), 6.0).div_(4)),
    ("logical_and_", lambda: causal().logical_and_(positions() > 0)),
    ("&=", lambda: causal().__iand__(positions() > 0)),
    ("logical_or_", lambda: causal().logical_or_(positions() > 1)),
    ("|=", lambda: causal().__ior__(positions() > 1)),
    ("logical_not_", lambda: causal().logical_not_()),
    ("bitwise_not_", lambda: causal().bitwise_not_()),
    ("masked_fill_", lambda: torch.zeros(4, 4).masked_fill_(causal(), -torch.inf)),
    ("masked_fill_ by a tensor", lambda: torch.zeros(4, 4).masked_fill_(causal(), torch.tensor(2))),
    ("tril_", lambda: torch.full((4, 4), 3.0).tril_(1)),
    ("triu_", lambda: torch.full((4, 4), -torch.inf).triu_(1)),
]


@pytest.mark.parametrize("run", [r[1] for r in IN_PLACE], ids=[r[0] for r in IN_PLACE])
def test_what_is_written_to_new_memory_is_read_as_what_torch_computes(
    run: Callable[[], Tensor],
) -> None:
    assert_read_exactly(run)
