"""Update RMS: the table beside the step that it describes."""

import math
import re

import pytest
import torch

from moonfx.optim.coefficients import per_step
from moonfx.optim.matrices import Layout
from moonfx.optim.step.gaussian_rms import correction
from moonfx.optim.update_rms import update_rms
from tests.support.optim.by_hand import Row, muon
from tests.support.optim.orthogonal import matrix, orthogonal, rms

# name, shape, layout, blocks of the parameter as (name, slice, matrix)
PARAMETERS = [
    ("square", (32, 32), Layout(), [("square", slice(None), (32, 32))]),
    ("wide", (16, 64), Layout(), [("wide", slice(None), (16, 64))]),
    ("fused", (48, 32), Layout(sizes=(32, 16)), [
        ("fused[0]", slice(0, 32), (32, 32)),
        ("fused[1]", slice(32, 48), (16, 32)),
    ]),
    ("filters", (16, 4, 3, 3), Layout("flatten"), [("filters", slice(None), (16, 36))]),
    ("experts", (3, 16, 24), Layout("batch"), [("experts", slice(None), (16, 24))]),
    ("middle", (16, 3, 24), Layout("middle"), [("middle", slice(None), (16, 24))]),
    ("groups", (16, 4, 3, 3), Layout("flatten", outer=2), [("groups", slice(None), (8, 36))]),
]  # fmt: skip
HOW = [
    ("as it is", {}),
    ("without Nesterov", dict(nesterov=False)),
    ("exact_rms", dict(exact_rms=True)),
    ("coupled decay", dict(decay="coupled")),
    ("maximize", dict(maximize=True)),
    ("polar_express", dict(coefficients=per_step("polar_express"))),
]


@pytest.fixture
def converted():
    """A Muon of PARAMETERS, a bias and an embedding after two steps, and gradients for a third."""

    def make(maximize=False, **how):
        shapes = [shape for _, shape, _, _ in PARAMETERS]
        ps = [torch.nn.Parameter(matrix(*s, seed=i)) for i, s in enumerate([*shapes, (16,)])]
        adamw = torch.optim.AdamW(ps, lr=1.0, weight_decay=0.1, maximize=maximize)
        rows = [Row(name, layout=layout) for name, _, layout, _ in PARAMETERS]
        opt = muon(adamw, *rows, Row("bias", "adamw"), **how)
        for step in range(3):
            for i, p in enumerate(ps):
                p.grad = matrix(*p.shape, seed=10 * step + i)
            if step < 2:
                opt.step()
        return opt, ps

    return make


@pytest.mark.parametrize("how", [how for _, how in HOW], ids=[name for name, _ in HOW])
def test_what_the_table_shows_between_backward_and_step_is_what_the_step_does(converted, how):
    opt, ps = converted(**how)
    table = update_rms(opt)
    before = [p.detach().clone() for p in ps]
    opt.step()
    blocks = [block for _, _, _, blocks in PARAMETERS for block in blocks]
    assert [(r.name, r.shape) for r in table.rows] == [(name, shape) for name, _, shape in blocks]
    rows = iter(table.rows)
    kept = 1.0 if how.get("decay") == "coupled" else 1 - 1.0 * 0.1
    for p, old, (*_, blocks) in zip(ps, before, PARAMETERS):
        for _, cut, _ in blocks:
            row = next(rows)
            assert row.asked == 0.2
            # Of equal Newton-Schulz: float32 and bfloat16 rounding of the input alone.
            assert row.obtained == pytest.approx(rms((p.detach() - kept * old)[cut]), rel=2e-3)
            if how.get("exact_rms"):  # computed, so up to float32's rounding of a mean
                assert row.ratio == pytest.approx(1.0, rel=1e-6)


def test_the_table_leaves_the_optimizer_as_it_was_and_needs_no_gradient(converted):
    opt, ps = converted()
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in ps[:-1]]
    for p in ps:
        p.grad = None
    table = update_rms(opt)
    for row, p in zip(update_rms(opt).rows[:2], ps):
        m, n = p.shape
        expected = rms(orthogonal(opt.state[p]["momentum_buffer"]))
        expected *= 0.2 * math.sqrt(max(m, n)) / correction(m, n, per_step("muon"))
        assert row.obtained == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(opt.state[p]["momentum_buffer"], b) for p, b in zip(ps, buffers))
    text = str(table)
    assert re.search(r"^fused\[1\] +16 x 32 +0\.2000 +0\.\d{4} +\d\.\d{3}$", text, re.MULTILINE)
    assert re.search(r"obtained / asked: 0\.\d{3} to \d\.\d{3}$", text)
    assert "bias" not in text


def test_a_muon_that_has_not_begun_shows_an_empty_table_and_an_adamw_none():
    p = torch.nn.Parameter(matrix(8, 8))
    adamw = torch.optim.AdamW([p])
    with pytest.raises(TypeError, match=r"opt must be a moonfx\.Muon, got AdamW"):
        update_rms(adamw)
    table = update_rms(muon(adamw, Row("p")))
    assert table.rows == []
    assert "no parameter has a momentum yet" in str(table)


ILL = [("muon", 0.829), ("polar_express", 0.833), ("deepseek_v4", 0.993), ("cubic", 0.704)]


@pytest.mark.parametrize(("name", "expected"), ILL)
def test_only_exact_rms_gives_an_ill_conditioned_momentum_what_was_asked(name, expected):
    """Of singular values from 1 to 1e-4, which fine-tuning has too, some stay small.

    The law of Gaussian matrices then promises too much, and the table says by how much.
    """
    u, v = (torch.linalg.qr(matrix(128, 128, seed=i)).Q for i in (1, 2))
    momentum = u * torch.logspace(0, -4, 128) @ v.T
    ratios = {}
    for exact in (False, True):
        p = torch.nn.Parameter(torch.zeros(128, 128))
        opt = muon(
            torch.optim.AdamW([p], lr=1.0), Row("p"), exact_rms=exact, coefficients=per_step(name)
        )
        p.grad = momentum.clone()
        (row,) = update_rms(opt).rows
        opt.step()
        assert rms(p) == pytest.approx(row.obtained, rel=2e-3)
        ratios[exact] = rms(p) / 0.2
    assert ratios[False] == pytest.approx(expected, abs=0.01)
    assert ratios[True] == pytest.approx(1, abs=1e-3)  # the goal is 1 %
