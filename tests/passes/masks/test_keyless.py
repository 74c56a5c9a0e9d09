"""What a mask gives a query from which it hides every key, told from the graph alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.attention import find_attention, lay_out_heads
from moonfx.passes.context import Context
from moonfx.passes.masks import classify_mask
from moonfx.passes.masks.keyless import Keyless, keyless
from moonfx.policy import LayerPolicy
from tests.passes.attention.forms import NEG, SCALE, inputs
from tests.support.reading import traced

Attend = Callable[..., Tensor]


def keep(s: Tensor, real: Tensor) -> Tensor:
    n, m = s.shape[-2:]
    seen = torch.arange(m)[None, :] <= torch.arange(n)[:, None] + (m - n)
    return seen & real[:, None, None, :]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def added(value: float, scale: float = 1.0) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = scores(q, k)
        return (s + torch.where(keep(s, real), 0.0, value) * scale).softmax(-1) @ v

    return attend


def filled(value: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = scores(q, k)
        return s.masked_fill(~keep(s, real), value).softmax(-1) @ v

    return attend


def given(value: float | None) -> Attend:
    """A boolean mask of the operator where there is no value."""

    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        mask = keep(scores(q, k), real)
        mask = mask if value is None else torch.where(mask, 0.0, value)
        return F.scaled_dot_product_attention(q, k, v, mask)

    return attend


def two_planes(first: float, second: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = scores(q, k)
        s = s + torch.where(keep(s, real.new_ones(real.shape)), 0.0, first)
        return (s + torch.where(real[:, None, None, :], 0.0, second)).softmax(-1) @ v

    return attend


def filled_twice(first: float, second: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = scores(q, k)
        s = s.masked_fill(~keep(s, real.new_ones(real.shape)), first)
        return s.masked_fill(~real[:, None, None, :], second).softmax(-1) @ v

    return attend


def causal_alone(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    s = scores(q, k)
    return s.masked_fill(~keep(s, real.new_ones(real.shape)), NEG).softmax(-1) @ v


def step(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """One query, and its key behind those of a cache."""
    new = q[:, :, -1:]
    return filled(NEG)(new, torch.cat([k[:, :, :-1], new], 2), v, real)


def verdict(attend: Attend, dtype: torch.dtype = torch.float32) -> Keyless:
    q, k, v = inputs(dtype=dtype)
    gm = traced(attend, q, k, v, torch.ones(q.shape[0], k.shape[2], dtype=torch.bool))
    context = Context(gm, lambda *given: LayerPolicy())
    for each in (find_attention, lay_out_heads, classify_mask):
        each.run(gm.graph, context)
    (site,) = context.sites
    assert site.reject is None, site.reject
    return keyless(site, context)


def dense(attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
    """A keyless query's output, the gradient that enters it, and the values."""
    q, k, v = inputs()
    q.requires_grad_()
    real = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool)
    real[:, 0] = False
    out = attend(q, k, v, real)[:, :, 0]
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    return out, gradient, v


MEANS = [
    ("added", added(NEG), Keyless.MEAN),
    ("added, scaled", added(-1e30, scale=2.0), Keyless.MEAN),
    ("given to the operator", given(NEG), Keyless.MEAN),
    ("filled in", filled(NEG), Keyless.MEAN_OF_FILLED),
    ("filled in, small", filled(-1e4), Keyless.MEAN_OF_FILLED),
    ("filled in twice, the same", filled_twice(NEG, NEG), Keyless.MEAN_OF_FILLED),
]


@pytest.mark.parametrize(("attend", "expected"), [c[1:] for c in MEANS], ids=[c[0] for c in MEANS])
def test_a_finite_minimum_gives_the_mean_of_all_values(attend: Attend, expected: Keyless) -> None:
    """As the dense attention does, whose gradient is stopped by what is filled in alone."""
    assert verdict(attend) is expected
    out, gradient, v = dense(attend)
    torch.testing.assert_close(out, v.mean(2), atol=1e-6, rtol=1e-5)
    assert bool(gradient[:, :, 0].abs().sum()) is (expected is Keyless.MEAN)


@pytest.mark.parametrize(
    "attend", [added(-torch.inf), filled(-torch.inf), given(None), given(-torch.inf)]
)
def test_an_infinite_minimum_gives_zero(attend: Attend) -> None:
    assert verdict(attend) is Keyless.ZERO


def test_a_minimum_too_large_for_the_scores_is_infinite() -> None:
    assert verdict(filled(NEG), torch.float16) is Keyless.ZERO
    assert verdict(filled(-1e4), torch.float16) is Keyless.MEAN_OF_FILLED


def test_scores_that_are_left_beside_a_small_minimum_give_no_mean() -> None:
    """What is added leaves the order of the scores, unless it is so large that they are lost."""
    out, _, v = dense(added(-1e4))
    assert not torch.allclose(out, v.mean(2), atol=0.1)
    assert verdict(added(-1e4)) is Keyless.UNKNOWN


@pytest.mark.parametrize(
    "attend",
    [two_planes(NEG, -1e30), two_planes(NEG, NEG), filled_twice(NEG, -1e4)],
    ids=["two minima", "two planes", "filled in with two minima"],
)
def test_masks_that_differ_by_key_give_no_mean_of_all_values(attend: Attend) -> None:
    assert verdict(attend) is Keyless.UNKNOWN


def test_where_no_query_is_keyless_it_is_zero() -> None:
    assert verdict(causal_alone) is Keyless.ZERO
    assert verdict(step) is Keyless.ZERO
