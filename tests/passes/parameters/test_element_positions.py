"""Which element of a tensor each element of a view of it is, by running the view."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.parameters.dataflow import (
    CONSTANT,
    FlowValue,
)
from moonfx.passes.parameters.element_positions import (
    alike,
    by_channel,
    distinct,
    is_pointwise,
    replay_on_positions,
)
from tests.support.optim.uses import flow_of

# Name, a rearrangement of y [2, 6], and the last row of its positions; None where there are none.
VIEWS: list[tuple[str, Callable[[Tensor], Tensor], list[Any] | None]] = [
    ("a chunk", lambda y: y.chunk(3, -1)[1], [2, 3]),
    ("a view and a slice", lambda y: y.view(2, 3, 2)[..., 0], [0, 2, 4]),
    ("transposed", lambda y: y.mT[:, 0], [0, 1, 2, 3, 4, 5]),
    ("flipped", lambda y: y.flip(-1), [5, 4, 3, 2, 1, 0]),
    ("repeated", lambda y: y[:, :2].repeat(1, 2), [0, 1, 0, 1]),
    ("by an index", lambda y: y[:, torch.tensor([4, 0])], [4, 0]),
    ("an index that is computed", lambda y: y[:, y[0, :2].long()], None),
    ("arithmetic", lambda y: y * 2, None),
]


@pytest.mark.parametrize(("view", "row"), [v[1:] for v in VIEWS], ids=[v[0] for v in VIEWS])
def test_a_rearrangement_is_replayed_on_positions(
    view: Callable[[Tensor], Tensor], row: list[Any] | None
) -> None:
    flow = flow_of(view, torch.randn(2, 6))
    known: dict[FlowValue, Any] = {flow.values[0]: torch.arange(6).expand(2, 6)}
    for value in flow.values[1:]:
        moved = value.target is not CONSTANT and not is_pointwise(value)
        if moved and (at := replay_on_positions(value, known)) is not None:
            known[value] = at
    found = known.get(next(v for v in flow.values if v.returned))
    if row is None:
        assert found is None
    else:
        assert found is not None
        assert found.reshape(-1, len(row))[-1].tolist() == row


def test_positions_are_compared_by_what_is_not_expanded() -> None:
    row = torch.arange(4)
    assert alike(row.expand(1000, 4), row.expand(1000, 4))
    assert alike(row.expand(3, 4), row.repeat(3, 1))
    assert not alike(row.expand(3, 4), row.flip(0).expand(3, 4))
    assert not alike(row.expand(3, 4), row.expand(2, 4))
    assert distinct(torch.tensor([3, 1, 3]).expand(5, 3)).tolist() == [1, 3]


def test_a_convolution_of_each_channel_by_itself_keeps_channels_apart() -> None:
    def convolved(groups: int, out: int) -> FlowValue:
        weight = torch.randn(out, 6 // groups, 3)
        return flow_of(
            lambda x, w: F.conv1d(x, w, groups=groups), torch.randn(2, 6, 9), weight
        ).values[-1]

    assert by_channel(convolved(6, 6))
    assert not by_channel(convolved(6, 12))
    assert not by_channel(convolved(2, 6))
    assert not by_channel(convolved(1, 6))


def test_what_acts_on_each_element_by_itself_is_pointwise() -> None:
    for body, pointwise in (
        (torch.relu, True),
        (lambda x: x + x[:1], True),
        (lambda x: x.softmax(-1), False),
        (lambda x: x.double(), True),
        (lambda x: x.cumsum(0), False),
    ):
        assert is_pointwise(flow_of(body, torch.randn(2, 6)).values[-1]) == pointwise
