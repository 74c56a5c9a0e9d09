"""Update RMS: what a law says of it, against what Newton-Schulz in bfloat16 makes of matrices."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from moonfx.ops.newton_schulz import newton_schulz
from moonfx.optim.coefficients import COEFFICIENTS, composed, per_step
from moonfx.optim.matrices import Layout
from moonfx.optim.update_rms import correction, noise_rms, targets, update_rms
from tests.optim.by_hand import Row, muon

SEED = 20


def matrix(*shape, seed=SEED):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(triples):
    return [number for triple in triples for number in triple]


def orthogonal(x, name="muon", dtype=torch.bfloat16, steps=None):
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return newton_schulz(x.to(dtype), flat(per_step(name, steps)))


def rms(x):
    return x.double().square().mean().sqrt().item()


# Sides 64 to 1024, square to 1:16. A mean over few singular values fluctuates: four small matrices.
SHAPES = [(4, 64, 64), (4, 1024, 64), (1, 256, 256), (1, 256, 1024)]
ROWS = [(name, shape) for name in COEFFICIENTS for shape in SHAPES]
ROWS += [("muon", (1, 1024, 1024)), ("polar_express", (1, 1024, 1024))]


@pytest.mark.parametrize(("name", "shape"), ROWS)
def test_a_gaussian_matrix_gets_the_rms_that_its_correction_promises(name, shape):
    _, m, n = shape
    got = rms(orthogonal(matrix(*shape), name)) * math.sqrt(max(m, n))
    # The goal is 3 %. What is left is the fluctuation of one matrix's spectrum, below 1 %.
    assert got == pytest.approx(correction(m, n, per_step(name)), rel=0.01)


# RMS(O) sqrt(max), measured on Gaussian matrices elsewhere, to three digits.
MEASURED = [
    ("muon", 256, 256, 0.905),
    ("muon", 256, 1024, 0.955),
    ("quintic", 256, 256, 0.997),
    ("quintic", 256, 1024, 1.001),
    ("cubic", 256, 256, 1.019),
    ("cubic", 256, 1024, 1.061),
    ("deepseek_v4", 256, 256, 1.000),
    ("deepseek_v4", 256, 1024, 1.000),
]


@pytest.mark.parametrize(("name", "m", "n", "expected"), MEASURED)
def test_corrections_are_those_that_were_measured_before(name, m, n, expected):
    assert correction(m, n, per_step(name)) == pytest.approx(expected, abs=0.004)
    assert correction(n, m, flat(per_step(name))) == correction(m, n, per_step(name))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_vector_has_one_singular_value_and_so_an_exact_correction(name):
    """[1, N] gives |p(1)|, for Jordan's coefficients 0.69 of the nominal RMS."""
    exact = correction(1, 64, per_step(name))
    assert exact == abs(composed(per_step(name), 1.0))
    got = rms(orthogonal(matrix(64, 1), name, torch.float64)) * math.sqrt(64)
    assert got == pytest.approx(exact, rel=1e-5)
    if name == "muon":
        assert exact == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_lemma_1_the_rms_of_an_update_of_rank_r_is_the_root_of_r_over_its_entries(rank):
    x = matrix(64, rank).double() @ matrix(rank, 256, seed=1).double()
    # Ten steps that converge: all singular values 1. float64: in bfloat16 rounding has full rank.
    got = rms(orthogonal(x, "polar_express", torch.float64, steps=10))
    assert got == pytest.approx(math.sqrt(rank / (64 * 256)), rel=1e-6)


@pytest.mark.parametrize(("m", "n", "double"), [(64, 256, 2), (256, 64, 2), (64, 64, 1)])
def test_table_1_of_moonlight_the_weights_of_an_mlp_double(m, n, double):
    """[H, 4H] scaled by 0.2 sqrt(H), then by 0.2 sqrt(max): the sum of random steps doubles.

    The paper's own weights went from 2.52e-2 to 5.01e-2, and attention's, [H, H], stayed.
    """
    steps, gain = 20, correction(m, n, per_step("muon"))
    total = sum(orthogonal(matrix(m, n, seed=i)).float() for i in range(steps)) / gain
    # Independent steps add up as their squares do; 20 of them leave their sum a few percent off.
    expected = 0.2 * math.sqrt(steps)
    assert rms(0.2 * math.sqrt(max(m, n)) * total) == pytest.approx(expected, rel=0.05)
    assert rms(0.2 * math.sqrt(64) * total) == pytest.approx(expected / double, rel=0.05)


def source_of(adamw):
    """As moonfx.optim.state.adamw reads torch's AdamW."""
    state = adamw.state
    return SimpleNamespace(
        members=lambda: [(g, p) for g in adamw.param_groups for p in g["params"]],
        betas=lambda g: g["betas"],
        steps=lambda p, g: float(state[p].get("step", 0)) if p in state else 0.0,
        first_moment=lambda p: state[p]["exp_avg"] if p in state else None,
        second_moment=lambda p: state[p]["exp_avg_sq"] if p in state else None,
    )


MUON, ADAMW = SimpleNamespace(optimizer="muon"), SimpleNamespace(optimizer="adamw")


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.95), (0.8, 0.95)])
def test_on_noise_the_update_of_adamw_has_the_rms_that_its_betas_say(betas):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 64))
    adamw = torch.optim.AdamW([p], lr=1.0, betas=betas, weight_decay=0.0)
    moved = []
    for _ in range(150):
        before = p.detach().clone()
        p.grad = torch.randn(64, 64)
        adamw.step()
        moved.append(rms(p.detach() - before))
    # v_hat is itself noisy, and correlated with m_hat: up to 2 % below the theory.
    assert sum(moved[-20:]) / 20 == pytest.approx(noise_rms(betas[0]), rel=0.03)
    assert targets("betas", source_of(adamw), [MUON]) == [noise_rms(betas[0])]
    assert targets("measured", source_of(adamw), [MUON])[0] == pytest.approx(moved[-1], rel=1e-4)


def test_each_parameter_is_measured_by_itself_and_what_has_no_measure_takes_that_of_its_betas():
    torch.manual_seed(0)
    steady, noisy, zero, unused, bias = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(5))
    groups = [{"params": [steady, noisy]}, {"params": [zero, unused, bias], "betas": (0.5, 0.9)}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(60):
        steady.grad, noisy.grad = torch.ones(8, 8), torch.randn(8, 8)
        zero.grad = bias.grad = torch.zeros(8, 8)
        adamw.step()
    table = [MUON, MUON, MUON, MUON, ADAMW]
    found = targets("measured", source_of(adamw), table)
    assert found[0] == pytest.approx(1.0, rel=1e-5)  # a constant gradient: m_hat = sqrt(v_hat)
    assert found[1] == pytest.approx(noise_rms(0.9), rel=0.25)
    assert found[2:] == [noise_rms(0.5), noise_rms(0.5), None]
    assert targets(0.3, source_of(adamw), table) == [0.3, 0.3, 0.3, 0.3, None]


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
