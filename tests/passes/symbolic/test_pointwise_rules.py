"""Operators element by element: read as what torch computes, or not read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.reading import assert_read_exactly, read

WHOLE, REAL = torch.tensor([3, -2, 0, 1]), torch.tensor([0.5, -2.0, torch.nan, 0.0])
BOOL = torch.tensor([True, False, True, False])
Run = Callable[..., Tensor]


def rows(n: int = 4) -> Tensor:
    return torch.arange(n)[:, None]


def columns(n: int = 4) -> Tensor:
    return torch.arange(n)[None, :]


KNOWN: list[tuple[str, Run, tuple[Tensor, ...]]] = [
    ("sums and products", lambda: 3 * columns() - rows() + 2, ()),
    ("a number minus a tensor", lambda: 5 - columns(), ()),
    ("roots and powers of a constant", lambda: torch.full((2,), 16.0).sqrt() ** -2, ()),
    ("integers that are given", lambda x: x * 2 - columns(), (WHOLE,)),
    ("compared", lambda x: (columns() <= rows()) & (x > 0), (WHOLE,)),
    ("bools that are equal", lambda x: x == (columns() < 2), (BOOL,)),
    ("bools that differ", lambda x: x != (columns() < 2), (BOOL,)),
    ("a bool beside numbers", lambda x: torch.where(x, 5, True), (BOOL,)),
    ("a choice compared", lambda: torch.where(columns() <= rows(), 0.0, -9.0) < -1, ()),
    ("a number compared with a choice", lambda: torch.where(columns() < 2, 0.0, -9.0) < -1, ()),
    ("masked_fill", lambda x: torch.zeros(4).masked_fill(~x, -torch.inf), (BOOL,)),
    ("not, or", lambda x: ~x | (columns() == 1), (BOOL,)),
    ("clamp", lambda: (columns() - rows()).clamp(-1, 2), ()),
    ("clamp of a choice", lambda: torch.where(columns() < 2, 5, -5).clamp(min=0), ()),
    ("maximum", lambda: torch.maximum(columns(), rows()), ()),
    ("minimum", lambda: torch.minimum(columns(), rows()), ()),
    ("abs", lambda: (columns() - rows()).abs(), ()),
    ("abs of a choice", lambda: torch.where(columns() < 2, 5, -5).abs(), ()),
    ("log of 0 and 1", lambda: torch.ones(3, 3).tril().log(), ()),
    ("floor_divide", lambda: (columns() - 2) // 3, ()),
    ("div by floor", lambda: torch.div(columns() - 2, 3, rounding_mode="floor"), ()),
    ("a wider float", lambda x: x.to(torch.float64), (REAL[:2],)),
    ("integers as float64", lambda x: x.to(torch.float64), (WHOLE,)),
]


@pytest.mark.parametrize(("run", "given"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_it_is_read_as_what_torch_computes(run: Run, given: tuple[Tensor, ...]) -> None:
    assert_read_exactly(run, *given)


UNKNOWN: list[tuple[str, Run, tuple[Tensor, ...]]] = [
    ("a sum with alpha", lambda: torch.add(columns(), rows(), alpha=2), ()),
    ("floats that may be NaN, compared", lambda x: x == x, (REAL,)),
    ("a sum of floats", lambda x: x + x, (REAL,)),
    ("clamp of what may be NaN", lambda x: x.clamp(min=0), (REAL,)),
    ("log of what is not 0 or 1", lambda: torch.full((2,), 3.0).log(), ()),
    ("a quotient towards zero", lambda: torch.div(columns(), 3, rounding_mode="trunc"), ()),
    ("a quotient by what is negative", lambda: columns() // -3, ()),
    ("a quotient by what is not known", lambda x: columns() // x, (WHOLE.abs() + 1,)),
    ("bits of integers", lambda x: x & 1, (WHOLE,)),
    ("a narrower float", lambda x: x.to(torch.bfloat16), (REAL,)),
    ("a float as an integer", lambda x: x.to(torch.int64), (REAL[:2],)),
    ("integers in half", lambda x: x.to(torch.float16), (WHOLE,)),
    ("an index in half", lambda: columns().half(), ()),
]


@pytest.mark.parametrize(("run", "given"), [u[1:] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_what_is_not_known_exactly_is_a_leaf(run: Run, given: tuple[Tensor, ...]) -> None:
    assert read(run, *given).unknown
