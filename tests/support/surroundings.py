"""What a model around attentions is called with, and what its report says of them."""

from typing import Any

import torch
from torch import nn

from moonfx.report.report import Report
from tests.support.agreement import (
    LENGTH,
)

SPARSE = "sparse"
X = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module) -> Any:
    return model(X)


def outcome(report: Report) -> list[tuple[str, str]]:
    """Of each attention its layer, and "sparse" or the reason without its node."""
    return [(r.layer, r.reason.split(" (node")[0] or r.action) for r in report.rows]
