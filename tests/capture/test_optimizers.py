"""What torch keeps on an optimizer beside its state: hooks, its step, marks for schedulers."""

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from moonfx.capture.optimizers import (
    bare_step,
    count_as_stepped,
    load_hooks,
    no_hooks,
    replace_step,
    share_hooks,
    watched,
    without_hooks,
)
from tests.support.no_waits import NoWaits


def sgd(lr: float = 0.5) -> torch.optim.SGD:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return torch.optim.SGD([p], lr=lr)


def first_of(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["params"][0].detach()[0])


def test_a_bare_step_steps_and_runs_no_hook() -> None:
    optimizer, calls = sgd(), []
    optimizer.register_step_pre_hook(lambda *given: calls.append("before"))
    optimizer.register_step_post_hook(lambda *given: calls.append("after"))
    bare_step(torch.optim.SGD)(optimizer)
    assert (first_of(optimizer), calls) == (0.5, [])
    optimizer.step()
    assert (first_of(optimizer), calls) == (0.0, ["before", "after"])


def test_hooks_that_are_shared_run_for_both_and_are_removed_from_both() -> None:
    source, target, calls = sgd(), sgd(), []
    share_hooks(source, target)
    handle = source.register_step_post_hook(lambda o, *given: calls.append(o))
    target.step()
    source.step()
    handle.remove()
    target.step()
    assert calls == [target, source]


def test_no_hooks_are_those_of_an_optimizer_that_has_none() -> None:
    """Whatever torch adds to them is missed here first."""
    fresh: dict[str, Any] = vars(sgd())
    hooks = {k for k, v in fresh.items() if k.endswith("_hooks") and not k.startswith("_zero")}
    assert no_hooks().keys() == hooks
    assert not any(no_hooks().values())


def test_what_is_pickled_holds_no_hook_and_no_step() -> None:
    optimizer = sgd()
    optimizer.register_step_post_hook(lambda *given: None)
    replace_step(optimizer, lambda: None)
    kept = without_hooks(vars(optimizer))
    assert {"param_groups", "state", "defaults"} <= kept.keys()
    assert "step" not in kept
    pickle.dumps(kept)


def test_hooks_of_loading_are_those_that_were_registered() -> None:
    optimizer = sgd()

    def before(*given: Any) -> None: ...

    def after(*given: Any) -> None: ...

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    assert load_hooks(optimizer) == ([before], [after])


@pytest.mark.parametrize("stepped", [False, True])
def test_a_scheduler_warns_unless_the_optimizer_counts_as_stepped(stepped: bool) -> None:
    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if stepped:
        count_as_stepped(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    assert bool(caught) is not stepped


def test_another_step_is_taken_without_a_warning_of_the_scheduler() -> None:
    optimizer, calls = sgd(), []
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    replace_step(optimizer, lambda: calls.append(1))
    count_as_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert calls == [1]


def test_a_mode_that_sees_each_operator_is_noticed() -> None:
    assert not watched()
    with NoWaits():
        assert watched()
    assert not watched()
