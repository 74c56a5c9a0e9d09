"""Groups that are added to a Muon: their rows, and what cannot be added."""

import warnings

import pytest
import torch
from torch import nn

import moonfx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.more = nn.Linear(8, 8)
        self.words = nn.Embedding(16, 8)
        self.last = nn.Linear(8, 8, bias=False)


ADDED = [
    ("as a module says", "words", {}, ["adamw"]),
    ("a matrix and a bias", "more", {}, ["muon", "adamw"]),
    ("all by a word", "more", dict(optimizer="adamw"), ["adamw", "adamw"]),
    ("one by a role", "more", dict(roles={"more.weight": "adamw"}), ["adamw", "adamw"]),
]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, "AdamW8bit"])
@pytest.mark.parametrize(
    ("name", "extra", "kinds"), [x[1:] for x in ADDED], ids=[x[0] for x in ADDED]
)
def test_a_group_that_is_added_is_classified_as_those_before(name, extra, kinds, kind) -> None:
    if kind == "AdamW8bit":
        kind = pytest.importorskip("torchao.optim").AdamW8bit
    net = Net()
    source = kind(net.body.parameters(), lr=0.1)
    optimizer = moonfx.convert_optimizer(source, net)
    added = getattr(net, name)
    optimizer.add_param_group({"params": added.parameters(), "lr": 0.5, "mine": "kept", **extra})
    assert optimizer.param_groups is source.param_groups
    group = optimizer.param_groups[1]
    facts = [optimizer.facts[p] for p in group["params"]]
    assert [fact.row.optimizer for fact in facts] == kinds
    assert [fact.target_rms for fact in facts] == [0.2 if x == "muon" else None for x in kinds]
    assert (float(group["lr"]), group["mine"], group["momentum"]) == (0.5, "kept", 0.95)
    names = [f"{name}.{n}" for n, _ in added.named_parameters()]
    assert [row.name for row in optimizer.table[2:]] == names
    if kind is torch.optim.AdamW:  # torchao compiles its step
        before = [p.detach().clone() for p in added.parameters()]
        for p in added.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, added.parameters(), strict=True))


NAMED = ["mine.weight", "embed_tokens.weight", "last.weight"]
STRANGERS = [
    ("by a word: muon", None, dict(optimizer="muon"), ["muon", "muon"], False),
    ("by a word: adamw", None, dict(optimizer="adamw"), ["adamw", "adamw"], False),
    ("by shape", None, {}, ["muon", "muon"], True),
    ("by name", NAMED, {}, ["muon", "adamw"], True),
]


@pytest.mark.parametrize(
    ("names", "extra", "kinds", "warned"), [x[1:] for x in STRANGERS], ids=[x[0] for x in STRANGERS]
)
def test_parameters_that_the_model_does_not_own_are_added_by_their_names_and_shapes(
    names, extra, kinds, warned
) -> None:
    net = Net()
    body = net.body.named_parameters() if names else net.body.parameters()
    optimizer = moonfx.convert_optimizer(torch.optim.AdamW(body), net)
    own = [nn.Parameter(torch.randn(32, 32)) for _ in range(2)]
    params = [*own, net.last.weight]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = list(zip(names, params, strict=True)) if names else params
        optimizer.add_param_group({"params": given, **extra})
    assert [row.optimizer for row in optimizer.table[2:4]] == kinds
    assert ["2 added parameters" in str(w.message) for w in caught] == [True] * warned
    if not extra:  # the model's own keeps the model's word
        assert optimizer.table[-1].rule == "module"
    before = own[0].detach().clone()
    own[0].grad = torch.randn(32, 32)
    optimizer.step()
    assert not torch.equal(before, own[0])


NOT_ADDED = [
    ("twice the same", lambda net: {"params": net.body.weight}, ValueError),
    ("an unknown word", lambda net: {"params": net.last.weight, "optimizer": "sgd"}, ValueError),
    ("a bad role", lambda net: {"params": net.last.weight, "roles": {"x": 3}}, TypeError),
    ("no dict", lambda net: [net.last.weight], TypeError),
]


@pytest.mark.parametrize(
    ("group", "error"), [x[1:] for x in NOT_ADDED], ids=[x[0] for x in NOT_ADDED]
)
def test_a_group_that_cannot_be_added_leaves_the_optimizer_as_it_was(group, error) -> None:
    net = Net()
    optimizer = moonfx.convert_optimizer(torch.optim.AdamW(net.body.parameters()), net)
    with pytest.raises(error):
        optimizer.add_param_group(group(net))
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.table) == 2
