"""A step of Muon's matrices against ten lines of float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.optim.facts import KEYS
from moonfx.optim.matrices import Layout, single
from moonfx.optim.step import cpu_passes as passes
from moonfx.optim.step import update as step
from moonfx.optim.update_rms import update_rms
from tests.support.optim.by_hand import Row, expected_step, muon

# Relative to the largest change, with Newton-Schulz in float64: what is left is float32's rounding
# of weights of 1 against changes of 0.05.
EXACT = 1e-5
# With Newton-Schulz in bfloat16, as it is: rounding by 2^-9 in each of 15 products, which the small
# singular values carry on enlarged, comes to 3e-2 in the worst element of these matrices.
BFLOAT16 = 6e-2
LR, WD = 0.1, 0.3


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def stepped(
    weights: list[Tensor], grads: list[list[Tensor]], rows: list[Any], **how: Any
) -> tuple[Any, list[torch.nn.Parameter]]:
    """The optimizer and the parameters after a step per list of gradients."""
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    group = dict(params=parameters, lr=LR, weight_decay=WD, maximize=how.pop("maximize", False))
    optimizer = muon(torch.optim.AdamW([group]), *rows, **how)
    for of_step in grads:
        for p, g in zip(parameters, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer, parameters


def off(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """The largest error relative to the largest change."""
    change = (expected - before).abs().max()
    return float((found.double() - expected).abs().max() / change)


HOW = [
    ("as it is", {}),
    ("without Nesterov", dict(nesterov=False)),
    ("maximize", dict(maximize=True)),
    ("exact_rms", dict(exact_rms=True)),
    ("cautious decay", dict(decay="cautious")),
    ("coupled decay", dict(decay="coupled")),
    ("all at once", dict(decay="cautious", exact_rms=True, nesterov=False, maximize=True)),
]


@pytest.mark.parametrize("how", [h[1] for h in HOW], ids=[h[0] for h in HOW])
def test_three_steps_are_those_of_the_equations(how, monkeypatch) -> None:
    monkeypatch.setattr(step, "COMPUTE", torch.float64)
    shapes = [(16, 16), (8, 24), (8, 24), (24, 8)]
    weights = [gaussian(*s, seed=i) for i, s in enumerate(shapes)]
    grads = [[gaussian(*s, seed=9 + 5 * t + i) for i, s in enumerate(shapes)] for t in range(3)]
    rows = [Row(str(i)) for i in range(4)]
    optimizer, parameters = stepped(weights, grads, rows, **how)
    for i, p in enumerate(parameters):
        W, M = weights[i].double(), torch.zeros(shapes[i], dtype=torch.float64)
        for of_step in grads:
            W, M = expected_step(W, M, of_step[i].double(), LR, WD, **how)
        assert off(p.detach(), W, weights[i].double()) < EXACT
        buffer = optimizer.state[p]["momentum_buffer"]
        assert float((buffer.double() - M).abs().max()) < 1e-6
        assert optimizer.state[p].keys() == {"step", "momentum_buffer", *KEYS}
        assert optimizer.state[p]["step"] == 3


LAYOUTS = [
    ("a convolution", (6, 2, 3, 3), Layout("flatten")),
    ("a convolution of two groups", (6, 2, 3, 3), Layout("flatten", outer=2)),
    ("experts", (3, 6, 10), Layout("batch")),
    ("experts in the middle", (6, 3, 10), Layout("middle")),
    ("experts last", (6, 10, 3), Layout("last")),
    ("experts of groups, in the middle", (6, 2, 2, 10), Layout("middle")),
    ("gate and up of experts in the middle", (12, 3, 10), Layout("middle", outer=2, sizes=(3, 3))),
    ("experts of groups", (2, 2, 6, 10), Layout("batch")),
    ("query, key and value", (16, 6), Layout(sizes=(8, 4, 4))),
    ("interleaved by heads", (24, 6), Layout(outer=2, sizes=(4, 4, 4))),
    ("blocks of columns", (6, 16), Layout(dim=1, sizes=(8, 4, 4))),
    ("repeated blocks of columns", (6, 12), Layout(dim=1, outer=2, sizes=(2, 4))),
    ("gate and up of experts", (3, 12, 10), Layout("batch", sizes=(6, 6))),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize(("shape", "layout"), [c[1:] for c in LAYOUTS], ids=[c[0] for c in LAYOUTS])
@pytest.mark.parametrize("by", ["torch, exact", "torch", "the CPU's own passes"])
def test_each_matrix_of_a_layout_is_stepped_as_if_it_were_alone(
    shape, layout, by, monkeypatch
) -> None:
    exact = by == "torch, exact"
    if exact:
        monkeypatch.setattr(step, "COMPUTE", torch.float64)
    if by == "torch":
        monkeypatch.setattr(passes, "supports", lambda *_: False)
    before, grad = gaussian(*shape), gaussian(*shape, seed=1)
    W, G = before.double(), grad.double()
    matrices = [*zip(_flat(W, layout), _flat(G, layout), strict=True)]
    expected = W.clone()
    for slot, (w, g) in zip(_flat(expected, layout), matrices, strict=True):
        rows = w.reshape(_rows(w, layout), -1)
        new, _ = expected_step(rows, torch.zeros_like(rows), g.reshape(rows.shape), LR, WD)
        slot.copy_(new.view(slot.shape))
    for form in FORMATS if len(shape) == 4 and layout.kind == "flatten" else FORMATS[:1]:
        weight, towards = (x.contiguous(memory_format=form) for x in (before, grad))
        optimizer, (p,) = stepped([weight], [[towards]], [Row("w", layout=layout)])
        assert off(p.detach(), expected, W) < (EXACT if exact else BFLOAT16)
        assert optimizer.state[p]["momentum_buffer"].shape == shape


def _flat(tensor: Tensor, layout: Layout) -> list[Tensor]:
    return [matrix for piece in single(tensor, layout) for matrix in piece]


def _rows(matrix: Tensor, layout: Layout) -> int:
    """Rows of a matrix, whose view may be [m, k, h, w], [outer, rows, n] or [m, outer, columns]."""
    first = layout.kind == "flatten" or layout.dim == 1
    return len(matrix) if first else matrix[..., 0].numel()


@pytest.mark.parametrize("by", ["torch", "the CPU's own passes", "a graph"])
def test_gradients_far_below_what_others_add_to_a_norm_do_not_stall(by, monkeypatch) -> None:
    """Clipped and late gradients are below 1e-7; zeros are no direction, and give none."""
    if by == "torch":
        monkeypatch.setattr(passes, "supports", lambda *_: False)
    moved = []
    for size in (1.0, 1e-8, 1e-20, 1e-37, 0.0):
        grads = [[gaussian(8, 24, seed=1) * size]]
        how = {"exact_rms": True, "compile": by == "a graph"}
        before = torch.zeros(8, 24)
        _, (p,) = stepped([before], grads, [Row("w")], **how)
        moved.append(float(p.detach().square().mean().sqrt()))
    assert moved == pytest.approx([0.2 * LR] * 4 + [0.0], rel=1e-3)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_weights_take_the_step_and_keep_their_dtype(dtype) -> None:
    before, grad = gaussian(16, 24, dtype=dtype), gaussian(16, 24, seed=1, dtype=dtype)
    optimizer, (p,) = stepped([before], [[grad]], [Row("w")])
    W = before.double()
    expected, _ = expected_step(W, torch.zeros_like(W), grad.double(), LR, WD)
    # The weight, of up to 4, rounds to its own precision twice, against changes of about 0.3.
    rounding = 2 * torch.finfo(dtype).eps * 4 / 0.3
    assert off(p.detach(), expected, W) < BFLOAT16 + rounding
    assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == dtype


def test_weights_are_changed_and_gradients_and_buffers_are_not_normalized(monkeypatch) -> None:
    """torch.optim.Muon normalizes the buffer itself in bfloat16 without Nesterov."""
    for supports in (passes.supports, lambda *_: False):
        monkeypatch.setattr(passes, "supports", supports)
        grad = gaussian(8, 8, seed=1, dtype=torch.bfloat16)
        weight = gaussian(8, 8, dtype=torch.bfloat16)
        optimizer, (p,) = stepped([weight], [[grad]], [Row("w")], nesterov=False)
        assert torch.equal(p.grad, grad)
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, grad * 0.05, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [True, False])
def test_a_step_is_as_long_for_gradients_whose_squares_overflow_or_vanish(
    taken, dtype, monkeypatch
) -> None:
    if not taken:
        monkeypatch.setattr(passes, "supports", lambda *_: False)
    weight, grad = torch.zeros(32, 32, dtype=dtype), gaussian(32, 32, dtype=dtype)
    _, (expected,) = stepped([weight], [[grad]], [])
    for exponent in (-110, -67, 63, 120):  # powers of two change no digit
        optimizer, (found,) = stepped([weight], [[grad * 2.0**exponent]], [])
        # The scales are rounded elsewhere, and with them here and there a number of X.
        assert off(found.detach(), expected.detach().double(), weight) < BFLOAT16
        found.grad = grad * 2.0**exponent
        (row,) = update_rms(optimizer).rows
        assert row.obtained == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("taken", [True, False])
def test_a_gradient_that_is_not_finite_spoils_all_of_its_matrix_and_no_other(
    taken, bad, monkeypatch
) -> None:
    if not taken:
        monkeypatch.setattr(passes, "supports", lambda *_: False)
    before = [gaussian(8, 12, seed=i) for i in range(3)]
    grads = [gaussian(8, 12, seed=i + 3) for i in range(3)]
    _, expected = stepped(before, [grads], [])
    grads[1][2, 3] = bad
    _, found = stepped(before, [grads], [])
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


def test_a_backward_over_weights_that_a_step_changed_is_refused() -> None:
    """By autograd, which counts changes: also those that no torch operation made."""
    p = torch.nn.Parameter(gaussian(8, 8))
    optimizer = muon(torch.optim.AdamW([p]))
    loss = (p @ p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("taken", [True, False])
def test_many_matrices_are_stepped_as_one_at_a_time_whatever_the_chunks(taken, monkeypatch) -> None:
    if not taken:
        monkeypatch.setattr(passes, "supports", lambda *_: False)
    shapes = [(8, 8)] * 5 + [(8, 16)] * 3 + [(16, 8), (5, 8, 8)]
    weights = [gaussian(*s, seed=i) for i, s in enumerate(shapes)]
    grads = [[gaussian(*s, seed=20 + i) for i, s in enumerate(shapes)]]
    rows = [
        Row(str(i), layout=Layout("batch" if len(s) > 2 else "matrix"))
        for i, s in enumerate(shapes)
    ]
    results = []
    for size in (1, 600, 1 << 30):
        monkeypatch.setitem(step.CHUNK_BYTES, "cpu", size)
        results.append([p.detach() for p in stepped(weights, grads, rows)[1]])
    for one, some, all_ in zip(*results, strict=True):
        assert torch.equal(one, some)
        assert torch.equal(one, all_)


def test_groups_keep_their_own_rates_decays_and_targets_within_one_bucket() -> None:
    before = [gaussian(8, 8, seed=i) for i in range(4)]
    grads = [gaussian(8, 8, seed=9 + i) for i in range(4)]
    rates = [(0.1, 0.0), (0.1, 0.5), (0.02, 0.5), (torch.tensor(0.02), 0.5)]
    for supports in (passes.supports, lambda *_: False):
        parameters = [torch.nn.Parameter(x.clone()) for x in before]
        groups = [
            {"params": [p], "lr": lr, "weight_decay": wd}
            for p, (lr, wd) in zip(parameters, rates, strict=True)
        ]
        optimizer = muon(torch.optim.AdamW(groups))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "supports", supports)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        for p, W, G, (lr, wd) in zip(parameters, before, grads, rates, strict=True):
            expected, _ = expected_step(W.double(), 0 * W.double(), G.double(), float(lr), wd)
            assert off(p.detach(), expected, W.double()) < BFLOAT16
