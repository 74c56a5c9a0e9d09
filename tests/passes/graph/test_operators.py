"""Operators that stand together: each spelling computes what the others do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.passes.graph import operators

X, Y = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[2.0, 4.0], [-1.0, 0.5]])
MASK = X > 0


def over_last_dim(operator: Any) -> Tensor:
    rest = {"half_to_float": False} if "._" in str(operator) and "safe" not in str(operator) else {}
    return operator(X, -1, **rest)


SPELLINGS: list[tuple[str, set[Any], Callable[[Any], Tensor], Tensor]] = [
    ("ADD", operators.ADD, lambda f: f(X.clone(), Y), X + Y),
    ("SUBTRACT", operators.SUBTRACT, lambda f: f(X.clone(), Y), X - Y),
    ("TANH", operators.TANH, lambda f: f(X.clone()), X.tanh()),
    ("EXP", operators.EXP, lambda f: f(X.clone()), X.exp()),
    ("SOFTMAX", operators.SOFTMAX, over_last_dim, X.softmax(-1)),
    ("LOG_SOFTMAX", operators.LOG_SOFTMAX, over_last_dim, X.log_softmax(-1)),
    ("SWAPS", operators.SWAPS, lambda f: f(X, 0, 1), X.mT),
    ("TRANSPOSES", operators.TRANSPOSES, lambda f: f(X), X.mT),
    ("COPIES", operators.COPIES, lambda f: f(X), X),
    ("VIEWS", operators.VIEWS, lambda f: f(X, [4]), X.flatten()),
    ("DETACHED", operators.DETACHED, lambda f: f(X.clone()), X),
]


@pytest.mark.parametrize(
    ("spellings", "call", "expected"), [s[1:] for s in SPELLINGS], ids=[s[0] for s in SPELLINGS]
)
def test_each_spelling_computes_the_same(
    spellings: set[Any], call: Callable[[Any], Tensor], expected: Tensor
) -> None:
    for operator in spellings:
        torch.testing.assert_close(call(operator), expected, msg=str(operator))


@pytest.mark.parametrize(
    ("spellings", "expected"),
    [(operators.MULTIPLY, X * 3), (operators.DIVIDE, X / 3), (operators.MASKED_FILL, None)],
    ids=["MULTIPLY", "DIVIDE", "MASKED_FILL"],
)
def test_a_number_and_a_tensor_of_it_are_one(spellings: set[Any], expected: Tensor | None) -> None:
    expected = X.masked_fill(MASK, 3.0) if expected is None else expected
    mask = [MASK] if spellings is operators.MASKED_FILL else []
    for operator in spellings:
        kind = str(operator._schema.arguments[-1].type)
        value = torch.tensor(3.0) if kind == "Tensor" else 3.0
        torch.testing.assert_close(operator(X.clone(), *mask, value), expected, msg=str(operator))


def test_in_place_stands_beside_the_same_out_of_place() -> None:
    for inside, outside in operators.IN_PLACE.items():
        assert inside._schema.is_mutable
        assert not outside._schema.is_mutable
        assert inside._schema.name == f"{outside._schema.name}_"
        arguments = ([str(a.type) for a in f._schema.arguments] for f in (inside, outside))
        assert next(arguments) == next(arguments)


def test_what_reads_a_shape_reads_no_value() -> None:
    """Attention that only such operators read is not read."""
    for operator in operators.SHAPE_ONLY - {torch.ops.aten.sym_size.int}:
        rest = (3.0,) if "full" in str(operator) else ()
        assert operator(torch.full((2, 3), torch.nan), *rest).shape == (2, 3)
        assert torch.Tag.pointwise not in operator.tags
