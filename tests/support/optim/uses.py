"""Models whose parameters have one letter each, and the roles that their traces give."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import ROLES, RoleRow
from moonfx.passes.parameters.dataflow import DataFlow, GraphCall

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


def check_roles(
    forward: Callable[..., Any], shapes: dict[str, Any], given: Tensor, expected: Any
) -> None:
    """The graph alone says the role of each parameter.

    Args:
        expected: by name; one role where the one parameter is `a`.
    """
    found = rows(Use(forward, **shapes), given)
    expected = {"a": expected} if isinstance(expected, str) else expected
    assert {name: row.role for name, row in found.items()} == expected
    for row in found.values():
        assert row.rule == "graph"
        assert row.optimizer == ROLES[row.role].optimizer


def flow_of(body: Callable[..., Any], *inputs: Any) -> DataFlow:
    """The data flow of one call of a function, whose parameters are among its inputs."""
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(*inputs)
    return DataFlow([GraphCall(gm, inputs)])
