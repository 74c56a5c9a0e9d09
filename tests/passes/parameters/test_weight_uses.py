"""Where the matrices lie in a parameter by its use, and what becomes of a use that is not clear."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from tests.support.optim.uses import HIDDEN, normed, rows


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
