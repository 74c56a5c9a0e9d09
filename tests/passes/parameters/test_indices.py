"""What the index of a gather is made of: positions, tokens, or the best of some scores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.passes.graph.nodes import aten
from moonfx.passes.parameters.dataflow import (
    FlowValue,
)
from moonfx.passes.parameters.indices import is_of_choices, is_of_positions
from tests.support.optim.uses import IDS, X, check_roles, flow_of, normed

# Name, forward, the shapes of its parameters, what to call it with, roles.
USES = [
    ("embedding", lambda m, i: normed(F.embedding(i, m.a)), {"a": (20, 8)}, IDS, "embedding"),
    ("gathered by index", lambda m, i: normed(m.a[i]), {"a": (20, 8)}, IDS, "embedding"),
    (
        "gathered by rows",
        lambda m, i: normed(m.a.index_select(0, i[0])),
        {"a": (20, 8)},
        IDS,
        "embedding",
    ),
    (
        "positions",
        lambda m, x: normed(x + F.embedding(torch.arange(x.shape[1]), m.a)),
        {"a": (20, 8)},
        X,
        "position embedding",
    ),
    (
        "positions of what is not padding",
        lambda m, i: normed(F.embedding((i != 0).cumsum(1), m.a)),
        {"a": (20, 8)},
        IDS,
        "position embedding",
    ),
    (
        "tokens at an offset, which is no position",
        lambda m, i: normed(F.embedding(i + 10 * torch.arange(2)[:, None], m.a)),
        {"a": (20, 8)},
        IDS,
        "embedding",
    ),
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    check_roles(forward, shapes, given, expected)


TABLE = nn.Parameter(torch.randn(20, 8))


def index_of(made: Callable[[Tensor], Tensor], given: Tensor) -> FlowValue:
    """The index of the one gather of a table."""
    flow = flow_of(lambda table, x: F.embedding(made(x), table), TABLE, given)
    (gather,) = (v for v in flow.values if v.target is aten.embedding.default)
    index = gather.args[1]
    assert isinstance(index, FlowValue)
    return index


# Name, an index made of what a model is given, whether it is of choices, and of positions.
INDICES: list[tuple[str, Callable[[Tensor], Tensor], Tensor, bool, bool]] = [
    ("tokens", lambda x: x, IDS, False, False),
    ("positions", lambda x: torch.arange(x.shape[1]), IDS, False, True),
    ("positions of what is not padding", lambda x: (x != 0).cumsum(1), IDS, False, True),
    ("positions and tokens", lambda x: torch.arange(5) + x, IDS, False, False),
    ("of one number", lambda x: torch.zeros_like(x), IDS, False, False),
    ("a position per row", lambda x: torch.arange(9).gather(0, x[0]), IDS, False, True),
    ("the best", lambda x: x.topk(2).indices, X, True, False),
    ("the best of the best", lambda x: x.topk(2).values.argmax(-1), X, True, False),
    ("rounded scores", lambda x: x.abs().long(), X, False, False),
]


@pytest.mark.parametrize(
    ("made", "given", "choices", "positions"), [i[1:] for i in INDICES], ids=[i[0] for i in INDICES]
)
def test_an_index_is_of_what_decides_its_numbers(
    made: Callable[[Tensor], Tensor], given: Tensor, choices: bool, positions: bool
) -> None:
    index = index_of(made, given)
    assert (is_of_choices(index), is_of_positions(index)) == (choices, positions)
