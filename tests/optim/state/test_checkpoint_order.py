"""A checkpoint that goes by names resumes with parameters in other places; by place, it says so.

A fused projection lies among matrices of its shape, so that only its name tells it from them.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

import moonfx
from tests.support.optim.nets import equal

pytestmark = pytest.mark.filterwarnings("error")


class Net(nn.Module):
    """qkv and up are [48, 16] both; head stays on AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.up = nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(48, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out: Tensor = self.norm(self.down(F.relu(self.up(F.scaled_dot_product_attention(q, k, v)))))
        return out


Places = list[list[str]]
AS_SAVED: Places = [["qkv.weight", "up.weight"], ["down.weight", "norm.weight", "norm.bias"]]
# name, the groups of the run that is resumed, whether the nested form can tell their settings
OTHERS: list[tuple[str, Places, bool]] = [
    ("as saved", AS_SAVED, True),
    ("parameters in another order", [group[::-1] for group in AS_SAVED], True),
    ("groups in another order", AS_SAVED[::-1], True),
    ("groups merged", [[*AS_SAVED[1], *AS_SAVED[0]]], True),
    ("every parameter alone", [[name] for group in AS_SAVED for name in group], False),
    ("a parameter in the other group", [["up.weight", "norm.bias", "norm.weight"],
                                        ["down.weight", "qkv.weight"]], True),
]  # fmt: skip


class Run:
    def __init__(self, places: Places, convert: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net()
        groups = [{"params": [self.model.get_parameter(n) for n in names]} for names in places]
        self.optimizer: Any = AdamW(groups, lr=0.01)
        self.scheduler = StepLR(self.optimizer, 1, 0.9)
        if convert:
            options = {"example": (torch.randn(2, 6, 16),), **options}
            self.optimizer = moonfx.convert_optimizer(self.optimizer, self.model, **options)

    def train(self, *steps: int) -> None:
        for step in steps:
            x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(x).square().mul(torch.linspace(0, 2, 16)).sum().backward()
            self.optimizer.step()
            self.scheduler.step()


def resume(run: Run, other: Run, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_state_dict(run.model, run.optimizer, options=options))
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=saved[0],
        optim_state_dict=saved[1],
        options=options,
    )


def assert_same(run: Run, other: Run) -> None:
    for (name, p), q in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        mine, its = run.optimizer.state[p], other.optimizer.state[q]
        assert mine.keys() == its.keys()
        assert all(equal(value, its[key]) for key, value in mine.items()), name
        assert run.optimizer.facts[p] == other.optimizer.facts[q]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("places", "nested_too"), [x[1:] for x in OTHERS], ids=[x[0] for x in OTHERS]
)
def test_a_run_resumed_with_its_parameters_in_other_places_is_the_uninterrupted_one(
    places, nested_too, flat
) -> None:
    run, other = Run(AS_SAVED, rms=0.3), Run(places)
    run.train(0, 1, 2)
    if not flat and not nested_too:
        before = copy.deepcopy(other.optimizer.state_dict()["param_groups"])
        with pytest.raises(ValueError, match="no settings of group 0.*flatten_optimizer_state"):
            resume(run, other, flat)
        assert other.optimizer.state_dict()["param_groups"] == before
        return
    resume(run, other, flat)
    run.train(3, 4)
    other.train(3, 4)
    assert_same(run, other)


def test_the_settings_of_one_group_are_those_of_all_that_it_became() -> None:
    names = [name for group in AS_SAVED for name in group]
    run, other = Run([names]), Run(AS_SAVED[::-1])
    run.train(0, 1)
    resume(run, other, flat=False)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.01 * 0.9**2] * 2
    run.train(2)
    other.train(2)
    assert_same(run, other)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_layouts_that_were_saved_go_on_in_another_order_where_nothing_else_shows_them(flat) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, other = Run(AS_SAVED), Run([AS_SAVED[0][::-1], AS_SAVED[1]], example=None)
    layout = {row.name: row.layout for row in moonfx.roles(run.optimizer)}["qkv.weight"]
    assert layout.sizes == (16, 16, 16)
    run.train(0)
    resume(run, other, flat)
    layouts = {row.name: row.layout.sizes for row in moonfx.roles(other.optimizer)}
    assert layouts == {name: layout.sizes if name == "qkv.weight" else () for name in layouts}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_files_give_each_parameter_its_layout_where_the_resumed_run_knows_none(
    flat, tmp_path
) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # also, that there is one process only
        warnings.simplefilter("ignore")
        run, other = Run(AS_SAVED), Run([AS_SAVED[0][::-1], AS_SAVED[1]], example=None)
        run.train(0)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved, into = (get_state_dict(r.model, r.optimizer, options=options) for r in (run, other))
        dcp.save({"optimizer": saved[1]}, checkpoint_id=tmp_path, no_dist=True)
        loaded = {"optimizer": into[1]}
        dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=saved[0],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    run.train(1)
    other.train(1)
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert run.optimizer.facts[p].row.layout == other.optimizer.facts[q].row.layout


@pytest.mark.parametrize(
    "places", [x[1] for x in OTHERS if x[2]], ids=[x[0] for x in OTHERS if x[2]]
)
def test_an_adamws_checkpoint_becomes_the_conversion_in_any_order(places) -> None:
    run, other = Run(AS_SAVED, convert=False), Run(places)
    run.train(0, 1)
    with pytest.warns(UserWarning, match="first moments of 3 parameters"):
        resume(run, other, flat=False)
    example = (torch.randn(2, 6, 16),)
    run.optimizer = moonfx.convert_optimizer(run.optimizer, run.model, example=example)
    run.train(2, 3)
    other.train(2, 3)
    assert_same(run, other)


def swapped(run: Run) -> Run:
    return Run([AS_SAVED[0][::-1], AS_SAVED[1]])


def on_adamw(run: Run) -> Run:
    return Run(AS_SAVED, roles={"qkv.weight": "adamw"})


def of_torchs_muon(run: Run) -> Run:
    for p in run.model.parameters():
        run.optimizer.state[p].pop("layout", None)
    return Run(AS_SAVED)


MISFITS: list[tuple[str, Callable[[Run], Run], str]] = [
    ("another order, by place", swapped, "holds qkv.weight where the optimizer has up.weight"),
    ("another role", on_adamw, "qkv.weight is on 'adamw' here and on 'muon' in state_dict"),
    ("without facts", of_torchs_muon, "qkv.weight, and no layout: it is of another Muon"),
]


@pytest.mark.parametrize(("make", "words"), [x[1:] for x in MISFITS], ids=[x[0] for x in MISFITS])
def test_what_cannot_be_matched_is_named_and_changes_nothing(make, words) -> None:
    run = Run(AS_SAVED)
    run.train(0)
    other = make(run)
    other.train(1)
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    after = other.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, state in before["state"].items():
        assert all(equal(v, after["state"][key][k]) for k, v in state.items())
