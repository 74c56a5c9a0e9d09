"""In which dims of a parameter its matrices lie: first, in the middle or last, and in groups."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moonfx.optim.matrices import Layout
from tests.support.optim.uses import Use, normed, rows

LAYOUTS = [
    # name, forward, shape, layout
    (
        "experts in the middle",
        lambda m, x: normed(torch.einsum("bhi,iho->bho", x, m.a)),
        (8, 5, 6),
        Layout("middle"),
    ),
    (
        "experts last",
        lambda m, x: normed(torch.einsum("bhi,oih->bho", x, m.a)),
        (6, 8, 5),
        Layout("last"),
    ),
    (
        "gate and up of experts in the middle",
        lambda m, x: normed((y := torch.einsum("bhi,ohi->bho", x, m.a))[..., :3] * y[..., 3:]),
        (6, 5, 8),
        Layout("middle", sizes=(3, 3)),
    ),
    (
        "one matrix of two summed dims",
        lambda m, x: normed(torch.einsum("bhi,hio->bo", x, m.a)),
        (5, 8, 6),
        None,
    ),
    (
        "a soft mixture of experts",
        lambda m, x: normed(torch.einsum("bnd,edf,bne->bnf", x, m.a, x[..., :3].softmax(-1))),
        (3, 8, 6),
        Layout("batch"),
    ),
    (
        "a soft mixture of experts, weighed first",
        lambda m, x: normed(torch.einsum("bne,bnd,def->bnf", x[..., :3].sigmoid(), x, m.a)),
        (8, 3, 6),
        Layout("middle"),
    ),
    (
        "a product of two activations, which weighs nothing",
        lambda m, x: normed(torch.einsum("bnd,edf,bne->bnf", x, m.a, x[..., :3])),
        (3, 8, 6),
        None,
    ),
    ("like another's type", lambda m, x: normed(F.linear(x, m.a.type_as(x))), (6, 8), Layout()),
    ("like another's shape", lambda m, x: normed(x @ m.a.view_as(x[0].mT)), (8, 5), Layout()),
    (
        "expanded like another",
        lambda m, x: normed(x @ m.a.expand_as(x.new_empty(2, 8, 6) + x.mean())),
        (8, 6),
        Layout(),
    ),
    (
        "a convolution of two groups",
        lambda m, x: normed(F.conv1d((x * m.b).mT, m.a, groups=2)),
        (6, 4, 3),
        Layout("flatten", outer=2),
    ),
]


@pytest.mark.parametrize(
    ("forward", "shape", "layout"), [r[1:] for r in LAYOUTS], ids=[r[0] for r in LAYOUTS]
)
def test_the_use_says_where_the_matrices_lie(
    forward: Callable[..., Any], shape: tuple[int, ...], layout: Layout | None
) -> None:
    row = rows(Use(forward, a=shape, b=(8,)))["a"]
    if layout is None:
        assert (row.role, row.optimizer) == ("unclear", "adamw")
    else:
        assert (row.layout, row.rule, row.optimizer) == (layout, "graph", "muon")


def test_a_row_for_each_group_of_a_convolution_is_no_matrix() -> None:
    row = rows(Use(lambda m, x: normed(F.conv1d((x * m.b).mT, m.a, groups=4)), a=(4, 2, 3), b=(8,)))
    assert (row["a"].role, row["a"].optimizer) == ("thin matrix", "adamw")
