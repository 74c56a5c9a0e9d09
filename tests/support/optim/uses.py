"""Models whose parameters have one letter each, and the roles that their traces give."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import RoleRow

HIDDEN = "hidden matrix"
IDS = torch.arange(10).view(2, 5)
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Use(nn.Module):
    """Parameters of the given shapes, each under one letter, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.use = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.use(self, *inputs)


def rows(model: nn.Module, *inputs: Any, **given: Any) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = classify(parameters, names, model, inputs or (X,), **given)
    return {row.name: row for row in found}


def normed(x: Tensor) -> Tensor:
    """Ends a model, so that the matrix before is no head."""
    return F.layer_norm(x, x.shape[-1:])
