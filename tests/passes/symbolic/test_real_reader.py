"""Floats read as real numbers, up to rounding, and never past the place where a gradient ends."""

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

from moonfx.passes.symbolic.indices import HEAD, KEY, QUERY
from moonfx.passes.symbolic.real_reader import RealReader
from tests.support.reading import plain_reader, returned, traced

PLACE = HEAD, QUERY, KEY


def read(
    run: Callable[..., Tensor], *given: Tensor, ends: Callable[[fx.Node], bool] = lambda n: False
) -> Any:
    gm = traced(run, *given)
    return RealReader(plain_reader(), ends).read(returned(gm), PLACE)


def distances(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(6)[None, :] - torch.arange(6)[:, None]).to(dtype)


def alibi(slopes: Tensor) -> Tensor:
    return slopes[:, None, None] * distances(slopes.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_product_that_rounds_is_read_up_to_rounding(dtype: torch.dtype) -> None:
    gm = traced(alibi, torch.ones(4, dtype=dtype))
    exact = plain_reader()
    assert exact.read(returned(gm), PLACE).func.__name__ == f"load_{returned(gm).name}"
    value = RealReader(exact, lambda n: False).read(returned(gm), PLACE)
    (leaf,) = (x for x in value.atoms(sympy.Function) if x.has(HEAD))
    assert leaf.args[0] == HEAD
    assert sympy.expand(value - leaf * (KEY - QUERY)) == 0


def test_the_conditions_of_a_mask_beside_it_are_read_exactly() -> None:
    def run(slopes: Tensor) -> Tensor:
        return torch.where(distances() <= 0, alibi(slopes), -1e9)

    value = read(run, torch.ones(4))
    assert isinstance(value, sympy.Piecewise)
    (kept, condition), (hidden, _) = value.args
    assert sympy.simplify(sympy.Equivalent(condition, KEY <= QUERY)) == True  # noqa: E712
    assert hidden == -(10**9)
    assert kept.has(KEY, QUERY, HEAD)


def test_nothing_is_read_past_the_end_of_a_gradient() -> None:
    def run(slopes: Tensor) -> Tensor:
        return slopes.exp().detach()[:, None, None] * distances()

    detach = torch.ops.aten.detach.default
    free = read(run, torch.ones(4))
    ended = read(run, torch.ones(4), ends=lambda node: node.target is detach)
    names = [{x.func.__name__ for x in v.atoms(sympy.Function)} for v in (free, ended)]
    assert names == [{"load_exp"}, {"load_detach"}]


def test_what_every_query_shares_stays_one_node_of_the_graph() -> None:
    """A rewrite can use it as it is: nothing has to be computed again."""

    def run(bias: Tensor) -> Tensor:
        return (bias * 2 + 1)[:, None, :] + distances() * 0.5

    value = read(run, torch.ones(4, 6))
    (leaf,) = value.atoms(sympy.Function)
    assert leaf.args == (HEAD, KEY)
    assert sympy.expand(value - leaf - (KEY - QUERY) / 2) == 0


def test_a_value_that_may_be_infinite_is_a_leaf() -> None:
    value = read(lambda x: x[:, None, None] / (distances() * 0), torch.ones(4))
    assert value.is_Function
