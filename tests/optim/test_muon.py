"""The optimizer around the step: what a training loop does to any torch.optim.Optimizer."""

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moonfx.optim.muon import Muon
from tests.support.optim.by_hand import Row, muon
from tests.support.optim.counting import Counting

LRScheduler = torch.optim.lr_scheduler


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(model: nn.Module, seed: int = 0) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    loss = model(batch(seed, dtype)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_groups_are_the_very_dicts_and_until_the_first_step_the_old_one_is_as_it_was() -> None:
    model = model_of()
    adamw = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-3, "mine": "kept"},
            {"params": model[2].parameters()},
        ]
    )
    train(model, adamw, 2)
    before = copy.deepcopy(adamw.state_dict()["state"])
    optimizer = muon(adamw)
    assert optimizer.param_groups is adamw.param_groups
    assert optimizer.param_groups[0]["mine"] == "kept"
    after = adamw.state_dict()["state"]
    assert before.keys() == after.keys() == {0, 1, 2, 3}
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])
    del after
    first_moment = weakref.ref(adamw.state[model[0].weight]["exp_avg"])
    train(model, optimizer, 1)
    gc.collect()
    assert first_moment() is None
    assert not adamw.state
    with pytest.raises(
        RuntimeError, match=r"moonfx\.convert_optimizer.*step\(\) of the moonfx\.Muon"
    ):
        adamw.step()


def test_muons_state_is_half_of_adamws() -> None:
    model = model_of()
    optimizer = muon(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, 1)
    for p in model.parameters():
        names = {"step", "momentum_buffer"} if p.ndim == 2 else {"step", "exp_avg", "exp_avg_sq"}
        tensors = {k for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        assert tensors == names


SCHEDULERS = [
    ("StepLR", lambda o: LRScheduler.StepLR(o, 1, 0.5)),
    ("OneCycleLR", lambda o: LRScheduler.OneCycleLR(o, 0.1, total_steps=8)),
    ("LambdaLR", lambda o: LRScheduler.LambdaLR(o, lambda t: 1 / (1 + t))),
]


@pytest.mark.parametrize("make", [x[1] for x in SCHEDULERS], ids=[x[0] for x in SCHEDULERS])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_scheduler_made_before_drives_muon_without_a_warning(make, steps_before) -> None:
    model, other = model_of(), model_of()
    adamw, reference = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other))
    scheduler, expected = make(adamw), make(reference)
    for _ in range(steps_before):
        train(model, adamw, 1)
        scheduler.step()
    for _ in range(steps_before):
        train(other, reference, 1)
        expected.step()
    optimizer = muon(adamw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(model, optimizer, 1)
            scheduler.step()
            train(other, reference, 1)
            expected.step()
            assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert optimizer.param_groups[0]["betas"] == reference.param_groups[0]["betas"]


def test_a_scheduler_made_after_drives_it_too() -> None:
    model = model_of()
    optimizer = muon(torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = LRScheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_hooks_go_over_and_fire_once_and_their_handles_still_remove_them() -> None:
    model = model_of()
    adamw = torch.optim.AdamW(model.parameters())
    seen: list[str] = []
    handles = [
        adamw.register_step_pre_hook(lambda o, *_: seen.append(f"before {type(o).__name__}")),
        adamw.register_step_post_hook(lambda o, *_: seen.append(f"after {type(o).__name__}")),
        adamw.register_state_dict_post_hook(lambda o, d: seen.append("state_dict")),
    ]
    general = register_optimizer_step_post_hook(lambda o, *_: seen.append("general"))
    try:
        optimizer = muon(adamw)
        train(model, optimizer, 1)
        optimizer.state_dict()
    finally:
        general.remove()
    assert seen == ["before Muon", "after Muon", "general", "state_dict"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    optimizer.state_dict()
    assert len(seen) == 4


def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned() -> None:
    model, plain = model_of(), model_of()
    by_closure, by_hand = (muon(torch.optim.AdamW(m.parameters())) for m in (model, plain))
    calls: list[bool] = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        by_closure.zero_grad()
        return backward(model)

    loss = by_closure.step(closure)
    expected = backward(plain)
    by_hand.step()
    assert calls == [True]
    assert torch.equal(loss, expected)
    assert same(weights(model), weights(plain))


def test_accumulated_and_clipped_gradients_step_as_given() -> None:
    model, at_once = model_of(), model_of()
    split, whole = (muon(torch.optim.AdamW(m.parameters())) for m in (model, at_once))
    for half in batch().chunk(2):
        (model(half).square().mean() / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    backward(at_once)
    nn.utils.clip_grad_norm_(at_once.parameters(), 0.1)
    for mine, its in zip(model.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)  # the sums differ in the last bits
        its.grad = mine.grad.clone()
    kept = [p.grad.clone() for p in model.parameters()]
    split.step()
    whole.step()
    assert same(weights(model), weights(at_once))
    assert same(kept, [p.grad for p in model.parameters()])  # gradients are only read


def test_a_grad_scaler_unscales_once_and_skips_what_overflows() -> None:
    model, plain = model_of(), model_of()
    scaled, unscaled = (muon(torch.optim.AdamW(m.parameters())) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(batch()).square().mean()).backward()
    scaler.step(scaled)
    scaler.update()
    backward(plain)
    unscaled.step()
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, its)  # the scale is a power of two
    before = weights(model)
    scaled.zero_grad()
    scaler.scale(model(batch()).square().mean()).backward()
    model[2].weight.grad[0, 0] = torch.inf
    scaler.step(scaled)
    assert same(before, weights(model))


COPIES = [
    ("deepcopy", copy.deepcopy),
    ("pickle", lambda x: pickle.loads(pickle.dumps(x))),
]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("again", [x[1] for x in COPIES], ids=[x[0] for x in COPIES])
def test_a_copy_of_model_and_optimizer_goes_on_bit_for_bit(again, steps_before) -> None:
    model = model_of()
    adamw = Counting(model.parameters(), lr=1e-2)
    train(model, adamw, 1)
    optimizer = muon(adamw)
    train(model, optimizer, steps_before)
    twin_model, twin = again((model, optimizer))
    assert isinstance(twin, Muon)
    assert twin.table == optimizer.table
    assert [id(p) for g in twin.param_groups for p in g["params"]] == [
        id(p) for p in twin_model.parameters()
    ]
    train(model, optimizer, 3, 5)
    train(twin_model, twin, 3, 5)
    assert same(weights(model), weights(twin_model))


def test_a_state_dict_resumes_bit_for_bit_and_schedulers_keep_their_groups() -> None:
    model, other = model_of(), model_of()
    first = muon(torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = LRScheduler.StepLR(first, 1, 0.5)
    train(model, first, 2)
    saved = copy.deepcopy((model.state_dict(), first.state_dict(), scheduler.state_dict()))
    train(model, first, 2, 2)
    source = torch.optim.AdamW(other.parameters(), lr=0.3)
    resumed_scheduler = LRScheduler.StepLR(source, 1, 0.5)
    second = muon(source)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed_scheduler.load_state_dict(saved[2])
    assert second.param_groups is source.param_groups
    train(other, second, 2, 2)
    assert same(weights(model), weights(other))
    resumed_scheduler.step()
    assert second.param_groups[0]["lr"] == 0.05


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = model_of()
    optimizer = muon(torch.optim.AdamW(model.parameters()))
    backward(model)
    model[0].weight.grad = model[0].bias.grad = None
    before = weights(model)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)] == [
        *(True, True, False, False)
    ]
    assert model[0].weight not in optimizer.state


def test_zero_gradients_decay_and_nothing_else() -> None:
    model = model_of()
    optimizer = muon(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = weights(model)
    optimizer.step()
    for old, new in zip(before, weights(model), strict=True):
        torch.testing.assert_close(new, old * 0.95)


def test_gradients_of_any_size_give_the_same_update() -> None:
    """Until their squares would no longer be normal numbers of float32."""
    results = []
    for scale in (1.0, 2.0**20, 2.0**-30):
        model = model_of()
        optimizer = muon(torch.optim.AdamW(model.parameters(), weight_decay=0.0, lr=0.1))
        backward(model)
        for p in model.parameters():
            p.grad.mul_(scale)
        optimizer.step()
        results.append([p.detach() for p in model.parameters() if p.ndim == 2])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_gradient_that_is_not_finite_stays_in_its_own_matrix() -> None:
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    optimizer = muon(torch.optim.AdamW(layers.parameters()))
    for p in layers.parameters():
        p.grad = torch.randn_like(p)
    layers[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert [bool(p.isfinite().all()) for p in layers.parameters()] == [True, False, True]


def test_an_empty_matrix_is_passed_over() -> None:
    parameters = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.empty(0, 4))]
    optimizer = muon(torch.optim.AdamW(parameters))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert parameters[1] not in optimizer.state
    assert parameters[1].shape == (0, 4)


REFUSED = [
    ("sparse", lambda: torch.eye(4).to_sparse(), "sparse", True),
    ("sparse, on AdamW", lambda: torch.eye(4).to_sparse(), "sparse", False),
    ("complex", lambda: torch.eye(4, dtype=torch.complex64), "complex", True),
]


@pytest.mark.parametrize(
    ("grad", "says", "muons"), [x[1:] for x in REFUSED], ids=[x[0] for x in REFUSED]
)
def test_a_gradient_that_cannot_be_stepped_is_named_before_anything_changes(
    grad, says, muons
) -> None:
    made = grad()
    dtype = made.dtype if made.is_complex() else torch.float32
    last = nn.Parameter(torch.randn(4, 4, dtype=dtype))
    parameters = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)), last]
    kinds = ["muon", "adamw", "muon" if muons else "adamw"]
    adamw = torch.optim.AdamW(parameters)
    optimizer = muon(adamw, *(Row(f"p{i}", kind) for i, kind in enumerate(kinds)))
    for p in parameters[:2]:
        p.grad = torch.ones_like(p)
    last.grad = made
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match=rf"the gradient of 'p2' is {says}.*Nothing was changed"):
        optimizer.step()
    assert same(before, [p.detach() for p in parameters])
    assert not optimizer.state
