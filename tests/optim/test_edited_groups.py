"""Groups that anyone edits after the conversion: what is known of a parameter follows it.

A fused projection, each block of which moves by 0.2 whatever its gradient's size, shows whose
layout it was stepped by.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

import moonfx
from moonfx.optim.matrices import Layout
from tests.support.optim.nets import net, train


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 16, bias=False)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.o = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.l(x)).chunk(3, -1)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v))
        return out


Groups = list[dict[str, Any]]


def converted(model: nn.Module, without: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The AdamW, with a group per child of the model, and the Muon."""
    groups = [
        {"params": list(child.parameters())}
        for name, child in model.named_children()
        if name not in without
    ]
    adamw = AdamW(groups, lr=1.0, weight_decay=0.0)
    return adamw, moonfx.convert_optimizer(adamw, model, example=(torch.randn(2, 6, 16),))


def stepped(model: Any, muon: Any) -> list[float]:
    """How far each block of the fused projection moves in a step."""
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    model.qkv.weight.grad[32:] *= 100
    before = model.qkv.weight.detach().clone()
    muon.step()
    return [
        block.square().mean().sqrt().item()
        for block in (model.qkv.weight - before).detach().split(16)
    ]


def reverse_parameters(groups: Groups) -> None:
    for group in groups:
        group["params"].reverse()


def join_all(groups: Groups) -> None:
    for group in groups[1:]:
        groups[0]["params"] = [*group["params"], *groups[0]["params"]]
    del groups[1:]


def split(groups: Groups) -> None:
    group = groups.pop()
    groups[:0] = [{**group, "params": [p]} for p in group["params"]]


EDITS: list[tuple[str, Callable[[Groups], Any]]] = [
    ("a group is taken out", lambda groups: groups.pop(0)),
    ("the groups are reversed", lambda groups: groups.reverse()),
    ("the parameters are reversed", reverse_parameters),
    ("all groups become one", join_all),
    ("a group becomes several", split),
    ("a group of none is put first", lambda groups: groups.insert(0, {**groups[0], "params": []})),
]


@pytest.mark.parametrize("of_adamw", [False, True], ids=["the Muon's", "the AdamW's"])
@pytest.mark.parametrize("edit", [x[1] for x in EDITS], ids=[x[0] for x in EDITS])
def test_a_fused_matrix_is_stepped_by_its_own_blocks_whatever_became_of_the_groups(
    edit, of_adamw
) -> None:
    torch.manual_seed(0)
    model = Attention()
    adamw, muon = converted(model)
    edit((adamw if of_adamw else muon).param_groups)
    assert stepped(model, muon) == pytest.approx([0.2] * 3, rel=0.02)
    layouts = {row.name: row.layout for row in moonfx.roles(muon)}
    assert layouts["qkv.weight"] == Layout(sizes=(16, 16, 16))
    moonfx.to_adamw(muon)


def by_adamw(adamw: Any, muon: Any, params: list[nn.Parameter]) -> None:
    adamw.add_param_group({"params": params, "lr": 0.5})


def by_muon(adamw: Any, muon: Any, params: list[nn.Parameter]) -> None:
    muon.add_param_group({"params": params, "lr": 0.5})


def by_hand(adamw: Any, muon: Any, params: list[nn.Parameter]) -> None:
    muon.param_groups.append({**adamw.defaults, "params": params, "lr": 0.5})


def in_place_of_all(adamw: Any, muon: Any, params: list[nn.Parameter]) -> None:
    new = {**muon.param_groups[0], "params": params, "lr": 0.5, "initial_lr": 0.5}
    muon.param_groups = [*muon.param_groups, new]


ADDED = [by_adamw, by_muon, by_hand, in_place_of_all]


@pytest.mark.parametrize("first", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("add", ADDED)
def test_a_group_that_is_added_in_any_way_is_stepped_by_its_role(add, first) -> None:
    torch.manual_seed(0)
    model = Attention()
    adamw, muon = converted(model, without=("qkv",))
    if first:
        stepped(model, muon)
    add(adamw, muon, [model.qkv.weight])
    assert adamw.param_groups is muon.param_groups
    assert stepped(model, muon) == pytest.approx([0.1] * 3, rel=0.02)
    assert [row.name for row in moonfx.roles(muon)][-1] == "qkv.weight"


def test_the_scheduler_of_the_adamw_drives_groups_that_were_put_in_the_place_of_all() -> None:
    model = net()
    adamw = AdamW(model.parameters(), lr=0.1)
    scheduler = StepLR(adamw, 1, 0.5)
    muon = moonfx.convert_optimizer(adamw, model)
    train(model, muon, range(1))
    muon.param_groups = [dict(group) for group in muon.param_groups]
    scheduler.step()
    assert muon.param_groups[0]["lr"] == 0.05


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BAD = [
    ("a lazy one", lambda: nn.LazyLinear(4).weight, "must see a batch first"),
    ("a complex matrix", lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.cfloat)), "is complex"),
    ("a sparse one", lambda: nn.Parameter(torch.eye(4).to_sparse()), "is sparse"),
]


@pytest.mark.parametrize(("make", "words"), [x[1:] for x in BAD], ids=[x[0] for x in BAD])
def test_what_joins_and_cannot_be_stepped_is_named_before_anything_changes(
    make, words, quiet
) -> None:
    model = net()
    adamw = AdamW(model.parameters(), lr=0.1)
    muon = moonfx.convert_optimizer(adamw, model)
    bad = make()
    adamw.param_groups.append({**adamw.defaults, "params": [bad]})
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=words):
        muon.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    muon.param_groups.pop()
    muon.step()


def test_tensors_that_take_the_places_of_parameters_take_over_what_is_known_of_them() -> None:
    """As libraries do that shard a model after its optimizer was prepared."""
    torch.manual_seed(0)
    model = Attention()
    _, muon = converted(model)
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.children():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[p])
    for group in muon.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    assert stepped(model, muon) == pytest.approx([0.2] * 3, rel=0.02)
    assert len(muon.facts) == len(new)


def test_finetuning_under_lightning_resumes_with_the_groups_that_its_callback_added(
    tmp_path, quiet
) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    callbacks = pytest.importorskip("pytorch_lightning.callbacks")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Attention()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            adamw = AdamW(trained, lr=0.01)
            example = (torch.randn(2, 6, 16),)
            return moonfx.convert_optimizer(adamw, self.model, example=example)

    class Unfreeze(callbacks.BaseFinetuning):  # type: ignore[misc, name-defined]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.model.qkv)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.model.qkv, optimizer)
            elif epoch > 1:  # it froze them when it began, also of a run that is resumed
                self.make_trainable(module.model.qkv)

    def fit(epochs: int, resumed: str | None = None) -> tuple[Any, Any]:
        torch.manual_seed(1)
        data = torch.utils.data.TensorDataset(torch.randn(4, 6, 16))
        saver = callbacks.ModelCheckpoint(dirpath=tmp_path / f"{epochs}{bool(resumed)}")
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[Unfreeze(), saver], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resumed)
        return module, saver.best_model_path

    whole, _ = fit(4)
    _, path = fit(2)
    resumed, _ = fit(4, path)
    assert resumed.optimizers().optimizer.on_muon(resumed.model.qkv.weight)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_adamw_that_is_given_other_groups_is_said_before_anything_changes() -> None:
    """Its schedulers would drive them, and the Muon's learning rate would stand still."""
    model = net()
    adamw = AdamW(model.parameters(), lr=0.1)
    muon = moonfx.convert_optimizer(adamw, model)
    train(model, muon, range(1))
    before = [p.detach().clone() for p in model.parameters()]
    adamw.load_state_dict(AdamW(net().parameters()).state_dict())
    with pytest.raises(ValueError, match="AdamW that was converted was given other groups"):
        train(model, muon, range(1))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    adamw.param_groups = muon.param_groups
    train(model, muon, range(1))


def test_parameters_without_names_inherit_nothing_from_one_another() -> None:
    torch.manual_seed(0)
    body, first, second = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))
    with pytest.warns(UserWarning, match="no model was given"):
        muon = moonfx.convert_optimizer(AdamW([body]))
    muon.add_param_group({"params": first, "optimizer": "adamw"})
    muon.param_groups.pop()
    with pytest.warns(UserWarning, match="by their names and shapes"):
        muon.add_param_group({"params": second})
    assert (muon.on_muon(first), muon.on_muon(second)) == (False, True)


class SetsItsRate(AdamW):
    """A schedule of its own, in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2
        super().step()


def test_a_rate_that_the_users_class_sets_as_it_steps_is_muons_too() -> None:
    model = net()
    muon = moonfx.convert_optimizer(
        SetsItsRate(model.parameters(), lr=0.2, weight_decay=0.0), model
    )
    before = model.up.weight.detach().clone()
    train(model, muon, range(1))
    moved = (model.up.weight.detach() - before).square().mean().sqrt()
    assert float(moved) == pytest.approx(0.1 * 0.2, rel=0.02)
