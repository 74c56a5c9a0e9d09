"""Which dims of a parameter a product sums over, and which become features."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moonfx.optim.matrices import Layout
from tests.support.optim.uses import Use, normed, rows

LAYOUTS = [
    # name, forward, shape, layout
    ("linear", lambda m, x: normed(F.linear(x, m.a)), (6, 8), Layout()),
    ("experts", lambda m, x: normed(x @ m.a), (2, 8, 6), Layout("batch")),
    (
        "gate and up of experts",
        lambda m, x: normed((y := x @ m.a)[..., :3].relu() * y[..., 3:]),
        (2, 8, 6),
        Layout("batch", 1, 1, (3, 3)),
    ),
    (
        "heads of one matrix",
        lambda m, x: normed(torch.einsum("bnd,dhe->bnhe", x, m.a)),
        (8, 2, 3),
        Layout("flatten"),
    ),
    (
        "experts under each other",
        lambda m, x: normed(F.linear(x[0], m.a.view(2, 6, 8)[0]) + F.linear(x[1], m.a[6:])),
        (12, 8),
        Layout("matrix", 0, 1, (6, 6)),
    ),
    (
        "filters",
        lambda m, x: normed(F.conv1d(x * x.mean() * m.b, m.a)),
        (6, 5, 3),
        Layout("flatten"),
    ),
]


@pytest.mark.parametrize(
    ("forward", "shape", "layout"), [r[1:] for r in LAYOUTS], ids=[r[0] for r in LAYOUTS]
)
def test_the_use_says_where_the_matrices_lie(
    forward: Callable[..., Any], shape: tuple[int, ...], layout: Layout
) -> None:
    shapes = {"a": shape, "b": (8,)} if layout == Layout("flatten") else {"a": shape}
    row = rows(Use(forward, **shapes))["a"]
    assert (row.layout, row.rule, row.optimizer) == (layout, "graph", "muon")


def test_a_matrix_that_no_layout_says_is_left_to_adamw() -> None:
    """Summed over its first two of three dims, it would be [2 4, 6]; flattened it is [2, 4 6]."""
    use = Use(
        lambda m, x: normed(torch.einsum("bnhe,hed->bnd", x.view(2, 5, 2, 4), m.a)), a=(2, 4, 6)
    )
    row = rows(use)["a"]
    assert (row.role, row.rule, row.optimizer) == ("unclear", "module", "adamw")
    assert "no layout says where the matrices are that einsum" in row.why
