"""The RMS that is asked for: by AdamW's betas, and as measured from its state."""

from types import SimpleNamespace

import pytest
import torch

from moonfx.optim.step.gaussian_rms import noise_rms
from moonfx.optim.target_rms import targets
from tests.support.optim.orthogonal import rms


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


ON_MUON, ON_ADAMW = SimpleNamespace(optimizer="muon"), SimpleNamespace(optimizer="adamw")


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
    assert targets("betas", source_of(adamw), [ON_MUON]) == [noise_rms(betas[0])]
    assert targets("measured", source_of(adamw), [ON_MUON])[0] == pytest.approx(moved[-1], rel=1e-4)


def test_each_parameter_is_measured_by_itself_and_what_has_no_measure_takes_that_of_its_betas():
    torch.manual_seed(0)
    steady, noisy, zero, unused, bias = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(5))
    groups = [{"params": [steady, noisy]}, {"params": [zero, unused, bias], "betas": (0.5, 0.9)}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(60):
        steady.grad, noisy.grad = torch.ones(8, 8), torch.randn(8, 8)
        zero.grad = bias.grad = torch.zeros(8, 8)
        adamw.step()
    table = [ON_MUON, ON_MUON, ON_MUON, ON_MUON, ON_ADAMW]
    found = targets("measured", source_of(adamw), table)
    assert found[0] == pytest.approx(1.0, rel=1e-5)  # a constant gradient: m_hat = sqrt(v_hat)
    assert found[1] == pytest.approx(noise_rms(0.9), rel=0.25)
    assert found[2:] == [noise_rms(0.5), noise_rms(0.5), None]
    assert targets(0.3, source_of(adamw), table) == [0.3, 0.3, 0.3, 0.3, None]
