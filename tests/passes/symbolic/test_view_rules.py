"""Operators that move elements: read where they come from, or not read."""

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.symbolic.view_rules import reshape_groups
from tests.support.reading import assert_read_exactly, plain_reader, read, returned, traced

X = torch.arange(24).view(2, 3, 4).flip(-1).contiguous()
Run = Callable[[Tensor], Tensor]

KNOWN: list[tuple[str, Run]] = [
    ("unsqueeze", lambda x: x.unsqueeze(-2)),
    ("expand", lambda x: x[:, :1].expand(2, 5, 4)),
    ("expand of a new dim", lambda x: x.expand(3, 2, 3, 4)),
    ("permute", lambda x: x.permute(2, 0, 1)),
    ("transpose", lambda x: x.transpose(-1, 0)),
    ("mT", lambda x: x.mT),
    ("flatten", lambda x: x.flatten(1)),
    ("unflatten", lambda x: x.unflatten(2, (2, 2))),
    ("reshape across dims", lambda x: x.reshape(3, 8)),
    ("squeeze", lambda x: x[:, :1].squeeze()),
    ("slice", lambda x: x[:, 1:]),
    ("slice by a step", lambda x: x[..., ::2]),
    ("slice from the end", lambda x: x[..., -3:]),
    ("slice up to the end", lambda x: x[:, :2]),
    ("select", lambda x: x[:, 2]),
    ("select from the end", lambda x: x[..., -1]),
    ("index in two dims", lambda x: x[torch.arange(2)[:, None], torch.arange(3)]),
    ("index in one dim of several", lambda x: x[:, torch.arange(2) + 1]),
    ("pad by nothing", lambda x: F.pad(x, (0, 0))),
    ("cat with what is empty", lambda x: torch.cat([x[:, :0], x], 1)),
    ("clone, contiguous, detach", lambda x: x.mT.contiguous().clone().detach()),
]


@pytest.mark.parametrize("run", [k[1] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_each_element_is_read_where_it_comes_from(run: Run) -> None:
    assert_read_exactly(run, X)


UNKNOWN: list[tuple[str, Run]] = [
    ("pad", lambda x: F.pad(x, (1, 0))),
    ("cat of two", lambda x: torch.cat([x, x], 1)),
    ("roll", lambda x: x.roll(1, -1)),
    ("flip", lambda x: x.flip(0)),
    ("index by a mask", lambda x: x[:, torch.ones(3) > 0]),
    ("index in dims that are apart", lambda x: x[torch.arange(2), :, torch.arange(2)]),
    ("index from the end", lambda x: x[:, torch.arange(2) - 2]),
]


@pytest.mark.parametrize("run", [u[1] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_what_is_not_known_exactly_is_a_leaf(run: Run) -> None:
    assert read(run, X).unknown


def test_a_slice_whose_start_may_be_before_the_front_is_a_leaf() -> None:
    """Python moves it to 0; a formula in lengths would read other keys."""
    gm = traced(lambda x, y: x[y.shape[0] - x.shape[0] :], X[0, 0], X[:, 0, 0], dynamic=True)
    reader, node = plain_reader(), returned(gm)
    reader.read(node, [sympy.Symbol("i", integer=True, nonnegative=True)])
    assert node in reader.leaves.values()


B, N, H, D = sympy.symbols("B N H D", integer=True, positive=True)
GROUPS = [
    ([B, N, 8], [B, N, 2, 4], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
    ([B, 2, N, 4], [B * 2, N, 4], [([0, 1], [0]), ([2], [1]), ([3], [2])]),
    ([B, N, H * D], [B, N, H, D], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
    ([2, 3], [3, 2], [([0, 1], [0, 1])]),
    ([N, 1], [N], [([0], [0]), ([1], [])]),
    ([0, 3], [3, 0], None),
    ([N], [B], None),
]


@pytest.mark.parametrize(("before", "after", "expected"), GROUPS)
def test_a_reshape_is_cut_into_the_shortest_runs_of_equal_product(
    before: list[object], after: list[object], expected: object
) -> None:
    sizes = ([sympy.sympify(n) for n in side] for side in (before, after))
    assert reshape_groups(*sizes) == expected
