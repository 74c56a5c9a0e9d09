"""Every form of AdamW is read to the same few values, and what is none is refused by name.

The reference is torch's AdamW after the same gradients: all of these keep the same two averages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from moonfx.optim.state.adamw import Source, read_adamw
from tests.support.optim.sources import SAM, BitsandbytesAdamW, FusedAdam, stepped

torchao = pytest.importorskip("torchao.optim", reason="needs torchao")

STEPS = 3
# Codes of 8 bits are off by some percent of a block's largest value, of 4 bits by a quarter.
EXACT, EIGHT, FOUR = 1e-6, 0.08, 0.4

Make = Callable[[Any], Optimizer]

FORMS: list[tuple[str, Make, bool, float]] = [
    # name, the optimizer, whether weight decay is coupled, relative error of the moments
    ("AdamW", AdamW, False, EXACT),
    ("AdamW foreach", partial(AdamW, foreach=True), False, EXACT),
    ("AdamW fused", partial(AdamW, fused=True), False, EXACT),
    ("AdamW maximize", partial(AdamW, maximize=True), False, EXACT),
    ("AdamW tensor lr", partial(AdamW, lr=torch.tensor(1e-3)), False, EXACT),
    ("Adam", Adam, True, EXACT),
    ("Adam decoupled", partial(Adam, decoupled_weight_decay=True), False, EXACT),
    ("torchao 8-bit", torchao.AdamW8bit, False, EIGHT),
    ("torchao 4-bit", torchao.AdamW4bit, False, FOUR),
    ("torchao fp8", torchao.AdamWFp8, False, EIGHT),
    ("torchao Adam 8-bit", torchao.Adam8bit, True, EIGHT),
    ("bitsandbytes", BitsandbytesAdamW, False, EXACT),
    ("bitsandbytes 8-bit", partial(BitsandbytesAdamW, bits=8), False, EIGHT),
    ("Apex", FusedAdam, False, EXACT),
    ("Apex Adam", partial(FusedAdam, adam_w_mode=False), True, EXACT),
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(64, 80, generator=generator) / 8) for _ in range(2)]


def error(value: Tensor | None, expected: Tensor | None) -> float:
    assert value is not None
    assert expected is not None
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("make", "coupled", "tolerance"), [f[1:] for f in FORMS], ids=[f[0] for f in FORMS]
)
def test_the_moments_steps_and_decay_of_every_adamw_are_read(make, coupled, tolerance) -> None:
    source = read_adamw(stepped(make(parameters()), STEPS))
    plain = Source(stepped(AdamW(parameters()), STEPS))
    sign = -1 if source.groups[0].get("maximize") else 1
    for (group, p), (_, q) in zip(source.members(), plain.members(), strict=True):
        first, second = plain.first_moment(q), plain.second_moment(q)
        assert first is not None
        assert error(source.first_moment(p), sign * first) < tolerance
        # A square takes twice the bits; 4-bit codes of it are only of the right size.
        assert error(source.second_moment(p), second) < 2 * tolerance
        assert source.steps(p, group) == STEPS
        assert source.betas(group) == (0.9, 0.999)
        assert source.coupled(group) is coupled


@pytest.mark.parametrize("make", [f[1] for f in FORMS], ids=[f[0] for f in FORMS])
def test_before_the_first_step_there_are_no_moments_and_reading_makes_none(make) -> None:
    optimizer = make(parameters())
    source = read_adamw(optimizer)
    for group, p in source.members():
        assert source.first_moment(p) is None
        assert source.second_moment(p) is None
        assert source.steps(p, group) == 0
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("make", "low"),
    [(f[1], f[3] > EXACT) for f in FORMS],
    ids=[f[0] for f in FORMS],
)
def test_quantized_states_are_known_as_such(make, low) -> None:
    assert read_adamw(make(parameters())).low_bit() is low
    assert read_adamw(stepped(make(parameters()), 1)).low_bit() is low


def test_names_are_those_given_and_places_are_always_there() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    assert read_adamw(AdamW([("x.weight", a), ("y.weight", b)])).names() == ["x.weight", "y.weight"]
    unnamed = read_adamw(AdamW([{"params": [a]}, {"params": [b, c]}]))
    assert unnamed.names() == ["", "", ""]
    assert unnamed.places() == [
        "param_groups[0].params[0]",
        "param_groups[1].params[0]",
        "param_groups[1].params[1]",
    ]


class Lamb(AdamW):
    """A class by a name that says that its update is not AdamW's."""


class AdamWScheduleFree(AdamW):
    """As the package schedulefree has it."""


class ScheduleFreeAdamW(AdamW):
    """As the package pytorch-optimizer has it."""


class OfTheirs(AdamWScheduleFree):
    """Somebody's own, made from it."""


class Unknown(torch.optim.Optimizer):
    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)


class Wrapper(Optimizer):
    """As AcceleratedOptimizer: an Optimizer that holds another and has no state of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state, self.param_groups = optimizer.state, optimizer.param_groups


class Holder:
    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer


def W() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(4, 4))]


def with_group(**changes: Any) -> Optimizer:
    optimizer = AdamW(W())
    optimizer.param_groups[0].update(changes)
    return optimizer


def without(key: str) -> Optimizer:
    optimizer = AdamW(W())
    del optimizer.param_groups[0][key]
    return optimizer


def emptied() -> Optimizer:
    optimizer = AdamW(W())
    optimizer.param_groups[0]["params"] = []
    return optimizer


ADAM = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}

REFUSED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # name, what is given, the error, what it says
    ("no optimizer", lambda: nn.Linear(2, 2), TypeError, "must be a torch.optim.Optimizer, got L"),
    ("None", lambda: None, TypeError, "got NoneType"),
    ("a list", lambda: [AdamW(W())], TypeError, "got list"),
    ("a class", lambda: AdamW, TypeError, "the class AdamW itself"),
    ("a scheduler", lambda: torch.optim.lr_scheduler.LambdaLR(AdamW(W()), float), TypeError,
     "got LambdaLR; it has one: give its .optimizer"),
    ("SGD", lambda: torch.optim.SGD(W(), lr=0.1), TypeError, "class SGD, which is not converted"),
    ("LBFGS", lambda: torch.optim.LBFGS(W()), TypeError, "it needs a closure"),
    ("RMSprop", lambda: torch.optim.RMSprop(W()), TypeError, "has no betas"),
    ("SparseAdam", lambda: torch.optim.SparseAdam(W()), TypeError, "its gradients are sparse"),
    ("NAdam", lambda: torch.optim.NAdam(W()), TypeError, "weighted by a schedule"),
    ("torch's Muon", lambda: torch.optim.Muon(W()), TypeError, "it is a Muon already"),
    ("a subclass by another name", lambda: Lamb(W()), TypeError, "class Lamb, which is not"),
    ("schedule-free", lambda: AdamWScheduleFree(W()), TypeError, "averages of w"),
    ("schedule-free, by another name", lambda: ScheduleFreeAdamW(W()), TypeError, "averages of w"),
    ("made from a schedule-free one", lambda: OfTheirs(W()), TypeError, "class OfTheirs, which is"),
    ("SAM", lambda: SAM(W(), AdamW, lr=0.1), TypeError, "wrapper.base_optimizer = moonfx.convert"),
    ("nothing says AdamW", lambda: Unknown(W(), ADAM), TypeError, "it has no states yet"),
    ("a wrapper", lambda: Wrapper(AdamW(W())), TypeError, "convert before wrapping"),
    ("a holder", lambda: Holder(AdamW(W())), TypeError, "wrapper._optimizer ="),
    ("no parameters", emptied, ValueError, "adamw has no parameters"),
    ("no betas", lambda: without("betas"), ValueError, "has no betas, which AdamW needs"),
    ("three betas", lambda: with_group(betas=(0.9,) * 3), ValueError, "must be two numbers"),
    ("beta of 1", lambda: with_group(betas=(0.9, 1.0)), ValueError, r"must lie in \[0, 1\)"),
    ("amsgrad", lambda: AdamW(W(), amsgrad=True), ValueError, "Muon keeps no second moment"),
    ("differentiable", lambda: AdamW(W(), differentiable=True), ValueError, "differentiable=True"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "kind", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_is_no_adamw_is_refused_by_name(make, kind, words) -> None:
    with pytest.raises(kind, match=words):
        read_adamw(make())
