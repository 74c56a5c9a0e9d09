"""Look-alikes of Newton-Schulz steps: a graph that must stay as it was written, with the reason."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import QUINTIC, normalized
from tests.support.newton_schulz.spellings import Spelling

Body = Callable[..., Any]
# Name, one step, the shape of X, and the reason; None where nothing in it is like a step.
Near = tuple[str, Spelling, tuple[int, ...], str | None]
# Name, a function, its inputs, and a part of the reason.
Row = tuple[str, Body, tuple[Tensor, ...], str | None]

SQUARE = (5, 5)
ELSE = "something else than X comes in"
BROADCAST = "a matrix is broadcast or reshaped inside the step"
TENSOR = "a coefficient is a tensor, and not a number of the graph"


def check_near(step: Spelling, shape: tuple[int, ...], reason: str | None) -> None:
    """What is nearly a spelling of a step is not rewritten, for exactly that reason."""
    rewritten = Rewritten(lambda G: step(normalized(G), *QUINTIC), matrix(*shape))
    assert rewritten.calls == []
    assert rewritten.targets == rewritten.before
    assert [row.action for row in rewritten.rows] == ([] if reason is None else ["declined"])
    assert rewritten.reasons == ([] if reason is None else [reason])


def check_lookalike(body: Body, inputs: tuple[Tensor, ...], reason: str | None) -> None:
    """The graph holds no new operator, and its iteration is declined for a reason like this."""
    rewritten = Rewritten(body, *inputs)
    assert rewritten.calls == []
    assert [n for n in rewritten.targets if n not in rewritten.before] == []
    assert [row.action for row in rewritten.rows] == ([] if reason is None else ["declined"])
    assert all(reason in found for found in rewritten.reasons if reason is not None)
