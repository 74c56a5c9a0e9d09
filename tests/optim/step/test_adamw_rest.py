"""What stays on AdamW is stepped by the class that was converted, as that class would."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.step.adamw_rest import Rest
from tests.support.optim.by_hand import muon
from tests.support.optim.counting import Counting


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model: nn.Module, optimizer: Any, seed: int) -> None:
    """One step on the batch of a seed."""
    optimizer.zero_grad()
    batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    model(batch).square().mean().backward()
    optimizer.step()


OTHERS = [
    ("AdamW", torch.optim.AdamW, {}),
    ("AdamW foreach", torch.optim.AdamW, dict(foreach=True)),
    ("AdamW fused", torch.optim.AdamW, dict(fused=True)),
    ("AdamW, tensor lr", torch.optim.AdamW, dict(lr=torch.tensor(1e-2))),
    ("Adam", torch.optim.Adam, dict(weight_decay=0.1)),
    ("somebody's own", Counting, {}),
]


@pytest.mark.parametrize(("kind", "how"), [x[1:] for x in OTHERS], ids=[x[0] for x in OTHERS])
def test_what_is_not_muons_steps_as_its_own_class_bit_for_bit(kind, how) -> None:
    model, alone = model_of(), model_of()
    how = {"lr": 1e-2, **how}
    optimizer = muon(kind(model.parameters(), **how))
    biases = kind([p for p in alone.parameters() if p.ndim == 1], **how)
    for i in range(3):
        train(model, optimizer, i)
        for mine, its in zip(model.parameters(), alone.parameters(), strict=True):
            its.grad = mine.grad.clone()
        biases.step()
    for mine, its in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, its) == (mine.ndim == 1)
    if kind is Counting:
        assert optimizer.param_groups[0]["seen"] == 3
        assert optimizer.rest.attributes["calls"] == 3


def group_of(count: int, **settings: Any) -> dict[str, Any]:
    """A group of parameters of one number each."""
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    for p in parameters:
        p.grad = torch.ones(1)
    return {
        **torch.optim.AdamW([torch.zeros(1)], lr=0.1).defaults,
        **settings,
        "params": parameters,
    }


def every(parameter: torch.Tensor) -> bool:
    """All stay on AdamW."""
    return True


def test_the_parameters_of_adamw_are_stepped_and_no_other() -> None:
    rest = Rest(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    group, state = group_of(3), defaultdict(dict)
    first, muons, last = group["params"]
    rest.step([group], state, lambda p: p is not muons)
    assert [p.item() != 1.0 for p in group["params"]] == [True, False, True]
    assert set(state) == {first, last}
    assert len(group["params"]) == 3


def test_where_muon_steps_all_the_class_is_not_called() -> None:
    rest = Rest(Counting([nn.Parameter(torch.zeros(1))]))
    rest.step([group_of(1)], defaultdict(dict), lambda p: False)
    assert rest.attributes["calls"] == 0
    rest.step([group_of(1)], defaultdict(dict), every)
    assert rest.attributes["calls"] == 1


def test_what_steps_holds_neither_the_old_state_nor_the_old_hooks() -> None:
    source = Counting([nn.Parameter(torch.zeros(1))])
    fired: list[Any] = []
    source.register_step_pre_hook(lambda *given: fired.append(given))
    source.grad_scale = torch.ones(1)
    rest, group, state = Rest(source), group_of(1), defaultdict(dict)
    made = rest.optimizer([group], state, every)
    assert type(made) is Counting
    assert made.state is state
    assert not hasattr(made, "grad_scale")
    assert made.param_groups[0]["params"] == group["params"]
    rest.step([group], state, every)
    assert fired == []


def test_what_a_class_counts_in_its_groups_stays_in_them() -> None:
    rest, group = Rest(Counting([nn.Parameter(torch.zeros(1))])), group_of(2)
    state: Any = defaultdict(dict)
    for _ in range(3):
        rest.step([group], state, every)
    assert (group["seen"], rest.attributes["calls"]) == (3, 3)
