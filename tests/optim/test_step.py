"""A step of Muon's matrices against ten lines of float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.optim import step
from tests.optim.by_hand import Row, expected_step, muon

# Relative to the largest change, with Newton-Schulz in float64: what is left is float32's rounding
# of weights of 1 against changes of 0.05.
EXACT = 1e-5
# With Newton-Schulz in bfloat16, as it is: 5 iterations on Gaussian matrices round off by 1e-2.
BFLOAT16 = 3e-2
LR, WD = 0.1, 0.3


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def stepped(
    weights: list[Tensor], grads: list[list[Tensor]], rows: list[Row], **how: Any
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
        assert optimizer.state[p].keys() == {"step", "momentum_buffer"}
        assert optimizer.state[p]["step"] == 3
