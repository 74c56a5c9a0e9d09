"""The roles of small models without a trace."""

from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import RoleRow

FUSED, HIDDEN = "fused projection", "hidden matrix"


def rows(model: nn.Module, **given: Any) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {row.name: row for row in classify(parameters, names, model, **given)}


def roles(model: nn.Module, **given: Any) -> dict[str, str]:
    return {name: row.role for name, row in rows(model, **given).items()}


def nameless(named: dict[str, tuple[int, ...]], **given: Any) -> dict[str, RoleRow]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in named.values()]
    with pytest.warns(UserWarning, match="neither tied weights, nor which matrix produces"):
        found = classify(parameters, list(named), **given)
    return dict(zip(named, found, strict=True))


class Named(nn.Module):
    """Modules under the names given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class AroundIt(nn.Module):
    """A wrapper of the user's own, which holds the model under the word that DDP uses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


def small() -> Named:
    return Named(
        embed=nn.Embedding(9, 4), qkv=nn.Linear(4, 12), out=nn.Linear(4, 4), norm=nn.LayerNorm(4)
    )


THIRDS = Layout(sizes=(4, 4, 4))
