"""Muon in ten plain lines of float64, and a Muon made without the converter."""

from typing import Any

import torch
from torch import Tensor

from moonfx.optim.facts import Fact
from moonfx.optim.matrices import Layout
from moonfx.optim.muon import Muon
from moonfx.optim.roles.classify import Classifier
from moonfx.optim.roles.table import ONE_MATRIX, RoleRow
from moonfx.optim.settings import Settings
from moonfx.optim.step.update import rms_gain

JORDAN = (3.4445, -4.7750, 2.0315)


def Row(name: str, optimizer: str = "muon", layout: Layout = ONE_MATRIX) -> RoleRow:
    """As much of a row as a step looks at."""
    return RoleRow(name, (), "", "", optimizer, "a test says so", layout)


def orthogonalized(U: Tensor, steps: int = 5) -> Tensor:
    X = U / max(float(U.norm()), 1e-12)
    a, b, c = JORDAN
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def expected_step(
    W: Tensor, M: Tensor, G: Tensor, lr: float, wd: float, mu: float = 0.95, **how: Any
) -> tuple[Tensor, Tensor]:
    """The weight and the buffer of one matrix [m, n] after a step; float64 in and out."""
    G = -G if how.get("maximize") else G
    G = G + wd * W if how.get("decay") == "coupled" else G
    M = mu * M + (1 - mu) * G
    O = orthogonalized(mu * M + (1 - mu) * G if how.get("nesterov", True) else M)
    size = 1.0 / float(O.square().mean().sqrt()) if how.get("exact_rms") else 0.0
    s = 0.2 * (size or rms_gain(*W.shape, JORDAN * 5))
    kept = {"decoupled": 1.0, "coupled": 0.0, "cautious": (O * W > 0).double()}
    return W - lr * wd * kept[how.get("decay", "decoupled")] * W - lr * s * O, M


def muon(source: torch.optim.Optimizer, *rows: RoleRow, **settings: Any) -> Muon:
    """A Muon of an optimizer with a row per parameter; without rows, whatever is a matrix."""
    parameters = [p for group in source.param_groups for p in group["params"]]
    table = list(rows) or [
        Row(f"p{i}", "muon" if p.ndim == 2 else "adamw") for i, p in enumerate(parameters)
    ]
    facts = {
        p: Fact(row, 0.2 if row.optimizer == "muon" else None)
        for p, row in zip(parameters, table, strict=True)
    }
    state = {
        p: source.state[p]
        for p, row in zip(parameters, table, strict=True)
        if row.optimizer == "adamw" and p in source.state
    }
    return Muon(
        source,
        facts,
        Settings(**settings),
        classify=Classifier(),
        state=state,
    )
