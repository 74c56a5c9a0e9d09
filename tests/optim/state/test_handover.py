"""First moments become the momentum, and come back; second moments come back as an estimate.

Gradients are c S + N(0, 1), S fixed: c = 0 is nothing but noise, c = 1 as much signal as noise.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from moonfx.optim.matrices import Layout
from moonfx.optim.state.handover import (
    moments_of,
    momentum_of,
    muon_state,
    noise_share,
    second_moment,
)

MU = 0.95


def gradients(
    c: float, count: int, shape: tuple[int, int] = (64, 64), seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randn(shape, generator=generator)
    return [c * fixed + torch.randn(shape, generator=generator) for _ in range(count)]


def average(values: list[Tensor], b: float) -> Tensor:
    """The bias-corrected average with factor b."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = b * total + (1 - b) * value
    return total / (1 - b ** len(values))


def after(grads: list[Tensor], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the group of torch's AdamW after these gradients."""
    p = nn.Parameter(torch.zeros_like(grads[0], dtype=options.pop("dtype", torch.float32)))
    optimizer = AdamW([p], lr=0.0, **options)
    for grad in grads:
        p.grad = grad.to(p.dtype)
        optimizer.step()
    return optimizer.state[p], optimizer.param_groups[0]


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)],  # 8 bits, rounded at each step
)
def test_the_momentum_is_the_mean_gradient_that_adamw_had_estimated(
    dtype, tolerance, steps
) -> None:
    grads = gradients(0.3, steps)
    state, group = after(grads, dtype=dtype)
    momentum = momentum_of(state, group)
    assert momentum is not None
    assert momentum.dtype is dtype
    assert momentum.data_ptr() != state["exp_avg"].data_ptr()
    expected = average(grads, 0.9)
    assert (momentum - expected).norm() < tolerance * expected.norm()


def test_the_step_counter_goes_on_where_torch_keeps_it() -> None:
    state, group = after(gradients(0, 3))
    p = nn.Parameter(torch.zeros(64, 64))
    kept = muon_state(p, state, group, None)
    assert sorted(kept) == ["momentum_buffer", "step"]
    assert kept["step"].dtype is torch.float32
    assert kept["step"].device.type == "cpu"
    assert kept["step"] == 3
    assert kept["step"] is not state["step"]


def test_without_an_update_there_is_no_momentum() -> None:
    group = {"betas": (0.9, 0.999)}
    zeros = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(2, 2),
        "exp_avg_sq": torch.zeros(2, 2),
    }
    assert momentum_of({}, group) is None
    assert second_moment({}, group, MU) is None
    momentum = momentum_of(zeros, group)
    assert momentum is not None
    assert not momentum.any()
    assert second_moment(zeros, group, MU) is None


# --- the second moment, by way of one number ------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 0.9, 0.95])
@pytest.mark.parametrize("steps", [1, 5, 400])
def test_noise_share_is_the_power_that_averaging_leaves(b, steps) -> None:
    left = average(gradients(0, steps, (128, 128)), b).square().mean()
    # 16,384 independent squares: their mean is known to 1.1 %, one standard deviation.
    assert float(left) == pytest.approx(noise_share(b, steps), rel=0.05)


RATIOS = [
    # signal, betas, steps on AdamW
    (0.0, (0.9, 0.999), 100),
    (0.0, (0.9, 0.95), 20),
    (0.3, (0.9, 0.999), 100),
    (0.3, (0.9, 0.95), 20),
    (1.0, (0.9, 0.999), 100),
    (1.0, (0.8, 0.95), 20),
    (3.0, (0.5, 0.999), 20),
]


@pytest.mark.parametrize(("c", "betas", "steps"), RATIOS)
def test_the_ratio_kept_is_the_one_that_muons_average_will_show(c, betas, steps) -> None:
    kept = second_moment(*after(gradients(c, steps), betas=betas), MU)
    later = gradients(c, 200)
    shown = average([g.square() for g in later], 0.999).mean() / average(later, MU).square().mean()
    # Without signal the ratio stands on how much more than noise there is: least well known there.
    assert kept == pytest.approx(float(shown), rel=0.2)


def test_one_gradient_says_nothing_of_noise_and_zeros_say_nothing_at_all() -> None:
    assert second_moment(*after(gradients(1.0, 1)), MU) == pytest.approx(
        1 / noise_share(MU, math.inf)
    )
    no_average = after(gradients(1.0, 20), betas=(0.0, 0.999))
    assert second_moment(*no_average, MU) == pytest.approx(1 / noise_share(MU, math.inf))
    assert second_moment(*after([torch.zeros(8, 8)] * 3), MU) is None


def test_a_rank_one_second_moment_comes_back_as_it_was() -> None:
    rows, columns = torch.rand(16, 1) + 0.1, torch.rand(1, 24) + 0.1
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(16, 24, generator=generator).sign()
    group = {"betas": (0.9, 0.999)}
    momentum = signs * (rows * columns).sqrt()
    pair = moments_of(momentum, 10, group, Layout(), MU, 4.0)
    assert pair is not None
    first, second = pair
    torch.testing.assert_close(first, momentum * (1 - 0.9**10))
    exact = 4.0 * rows * columns
    expected = (exact + 0.01 * (exact.mean() - exact)) * (1 - 0.999**10)  # the floor
    torch.testing.assert_close(second, expected)


LAYOUTS = [
    # name, shape, layout
    ("matrix", (6, 8), Layout()),
    ("convolution", (6, 4, 3, 3), Layout("flatten")),
    ("convolution of two groups", (6, 4, 3, 3), Layout("flatten", outer=2)),
    ("experts", (3, 6, 8), Layout("batch")),
    ("experts in the middle", (6, 3, 8), Layout("middle")),
    ("experts last", (6, 8, 3), Layout("last")),
    ("experts of experts", (2, 3, 6, 8), Layout("batch")),
    ("fused", (12, 8), Layout(sizes=(4, 4, 4))),
]


@pytest.mark.parametrize(("shape", "layout"), [x[1:] for x in LAYOUTS], ids=[x[0] for x in LAYOUTS])
@pytest.mark.parametrize("scale", [1.0, 1e-12])  # squares of 1e-24: their products are no floats
def test_the_estimate_has_the_size_asked_for_in_every_layout(shape, layout, scale) -> None:
    momentum = torch.randn(shape) * scale
    pair = moments_of(momentum, 1e6, {"betas": (0.9, 0.999)}, layout, MU, 3.0)
    assert pair is not None
    assert pair[1].shape == momentum.shape
    assert float(pair[1].mean()) == pytest.approx(3.0 * float(momentum.square().mean()), rel=1e-4)
    assert (pair[1] > 0).all()


def test_each_expert_has_its_own_size_and_one_without_gradients_the_others() -> None:
    momentum = torch.randn(3, 8, 8) * torch.tensor([1.0, 100.0, 0.0])[:, None, None]
    pair = moments_of(momentum, 1e6, {"betas": (0.9, 0.999)}, Layout("batch"), MU, 1.0)
    assert pair is not None
    quiet, loud, silent = pair[1].mean((1, 2)).tolist()
    sizes = momentum.square().mean((1, 2)).tolist()
    assert quiet == pytest.approx(sizes[0], rel=1e-4)
    assert loud == pytest.approx(sizes[1], rel=1e-4)
    assert silent == pytest.approx(0.01 * sum(sizes) / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("momentum", "steps"),
    [(torch.zeros(4, 4), 10), (torch.ones(4, 4), 0)],
    ids=["zeros", "no step"],
)
def test_what_had_no_update_starts_afresh(momentum, steps) -> None:
    assert moments_of(momentum, steps, {"betas": (0.9, 0.999)}, Layout(), MU, None) is None
