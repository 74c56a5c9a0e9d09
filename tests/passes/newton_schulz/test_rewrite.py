"""Newton-Schulz iterations become one operator: which forms are known, and what is computed."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.support.newton_schulz.cases import Rewritten, matrix
from tests.support.newton_schulz.forms import CHANGING, FORMS, QUINTIC, Form, normalized
from tests.support.newton_schulz.lookalikes import check_lookalike
from tests.support.newton_schulz.spellings import SPELLINGS, Spelling

aten = torch.ops.aten
PRODUCTS = {
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default),
    *(aten.addmm.default, aten.baddbmm.default, aten.addmm_.default, aten.addmm.out),
    *(aten.baddbmm.out, aten.einsum.default, aten.linalg_multi_dot.default),
    *(aten.linalg_matrix_power.default, aten.inner.default, aten.tensordot.default),
    *(aten.mm.out, aten.matmul.out),
}


pytestmark = pytest.mark.usefixtures("operator_always")


@pytest.mark.parametrize(("name", "form", "shape", "steps"), FORMS, ids=[f[0] for f in FORMS])
def test_every_way_to_write_it_becomes_one_operator_of_the_same_value(
    name: str, form: Form, shape: tuple[int, ...], steps: int
) -> None:
    G = matrix(*shape)
    expected, rewritten = form(G.clone()), Rewritten(form, G)
    (row,) = rewritten.rows
    assert (row.count, row.calls, row.steps, row.action) == (1, 1, steps, "rewritten")
    constant = name.startswith(("Jordan", "Moonlight", "cast", "one step"))
    read, given = (
        torch.tensor(x) for x in (row.coefficients, [QUINTIC] * steps if constant else CHANGING)
    )
    # A factor of the last X that is written after it stays where it is.
    torch.testing.assert_close(read / read[:, :1], given / given[:, :1])
    assert len(rewritten.calls) == rewritten.count == 1
    assert not PRODUCTS.intersection(rewritten.targets)
    out = rewritten(G)
    assert out.stride() == expected.stride()
    # Spelled otherwise, a step is rounded at other places: a few units of the last place (2^-8 in
    # bfloat16), times what five steps make of them where a singular value is small.
    atol = 0.06 if row.dtype == "bfloat16" else 2e-5
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("name", "step", "shape"), SPELLINGS, ids=[s[0] for s in SPELLINGS])
def test_every_way_to_write_a_step_is_read(
    name: str, step: Spelling, shape: tuple[int, ...]
) -> None:
    def form(G: Tensor) -> Tensor:
        X = normalized(G)
        for numbers in CHANGING:
            X = step(X, *numbers)
        return X

    G = matrix(*shape)
    expected, rewritten = form(G.clone()), Rewritten(form, G)
    (row,) = rewritten.rows
    assert (row.count, row.calls, row.steps, row.action) == (1, 1, 3, "rewritten")
    torch.testing.assert_close(torch.tensor(row.coefficients), torch.tensor(CHANGING))
    with FlopCounterMode(display=False) as counted:
        form(G.clone())
    if name != "zeros":  # addmm_, which torch does not count
        assert row.flops_before == counted.get_total_flops()
    assert not PRODUCTS.intersection(rewritten.targets)
    torch.testing.assert_close(rewritten(G), expected, atol=2e-5, rtol=0)  # see above


def test_an_x_that_is_normalized_again_in_each_step_becomes_one_call_for_each() -> None:
    def form(G: Tensor) -> Tensor:
        X = G * 1.0
        for a, b, c in CHANGING:
            X = X / X.norm()
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        return X

    G = matrix(4, 6)
    rewritten = Rewritten(form, G)
    assert [(r.count, r.calls, r.steps) for r in rewritten.rows] == [(1, 1, 1)] * 3
    assert [r.coefficients for r in rewritten.rows] == [(numbers,) for numbers in CHANGING]
    torch.testing.assert_close(rewritten(G), form(G), atol=2e-5, rtol=0)  # see above


def autocast_between_steps(G: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the autocast and of the operator's call cannot both be kept."""
    a, b, c = QUINTIC
    X = normalized(G)
    A = X @ X.mT
    with torch.autocast("cpu", torch.bfloat16):
        seen = G.sum()
    return a * X + (b * A + c * A @ A) @ X, seen


def test_an_iteration_around_what_keeps_its_place_stays_as_it_was_written() -> None:
    reason = "_enter_autocast keeps its place"
    check_lookalike(autocast_between_steps, (matrix(4, 6),), reason)
