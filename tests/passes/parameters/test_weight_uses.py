"""Where the matrices lie in a parameter by its use, and what becomes of a use that is not clear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from tests.support.optim.uses import HIDDEN, Use, normed, rows

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


class Holds(nn.Module):
    """A Linear, of whose weight another use is made."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.use = nn.Linear(8, 6, bias=False), use

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.use(x, self.line.weight))


UNCLEAR = [
    (
        "a gain as well",
        lambda x, w: F.linear(x, w).sum(-1, keepdim=True) + x * w[:5],
        "and read by mul",
    ),
    # name, use of the weight, what is said
    ("masked weight", lambda x, w: F.linear(x, w * (w > 0)), "the weight at linear"),
    (
        "quantized weight",
        lambda x, w: F.linear(x, w + (w.round() - w).detach()),
        "is computed of it by",
    ),
    (
        "bilinear form",
        lambda x, w: F.bilinear(x, x, w.view(6, 8, 1).expand(6, 8, 8)),
        "read by bilinear",
    ),
]


@pytest.mark.parametrize(("use", "said"), [r[1:] for r in UNCLEAR], ids=[r[0] for r in UNCLEAR])
def test_where_the_use_is_not_clear_the_module_decides_and_the_reason_is_said(use, said) -> None:
    row = rows(Holds(use))["line.weight"]
    assert (row.role, row.rule, row.layout) == (HIDDEN, "module", Layout())
    assert row.why.startswith("a Linear (its use is not clear: ")
    assert said in row.why


def test_a_matrix_that_no_layout_says_is_left_to_adamw() -> None:
    """Summed over its first two of three dims, it would be [2 4, 6]; flattened it is [2, 4 6]."""
    use = Use(
        lambda m, x: normed(torch.einsum("bnhe,hed->bnd", x.view(2, 5, 2, 4), m.a)), a=(2, 4, 6)
    )
    row = rows(use)["a"]
    assert (row.role, row.rule, row.optimizer) == ("unclear", "module", "adamw")
    assert "no layout says where the matrices are that einsum" in row.why


PARAMETRIZED = [
    ("weight norm", nn.utils.parametrizations.weight_norm, "graph"),
    ("weight norm, the old one", nn.utils.weight_norm, "graph"),
    ("spectral norm", nn.utils.parametrizations.spectral_norm, "module"),
]


@pytest.mark.parametrize(
    ("wrap", "rule"), [r[1:] for r in PARAMETRIZED], ids=[r[0] for r in PARAMETRIZED]
)
def test_what_a_weight_is_computed_of_is_no_matrix(
    wrap: Callable[..., nn.Module], rule: str
) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = wrap(nn.Linear(8, 6, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return normed(self.line(x))

    found = rows(Computed().eval())
    assert {(row.role, row.rule) for row in found.values()} == {("weight norm", rule)}
