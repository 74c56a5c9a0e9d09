"""The user's own word on roles, and what is said of a bad one."""

from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from tests.support.optim.roles import (
    FUSED,
    HIDDEN,
    THIRDS,
    AroundIt,
    Named,
    rows,
    small,
)


def is_out(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("out") and parameter.ndim == 2


OVERRIDES = [
    # key, what, the parameter, role, optimizer, layout
    ("embed.weight", "muon", "embed.weight", "embedding", "muon", Layout()),
    ("_orig_mod.embed.weight", "muon", "embed.weight", "embedding", "muon", Layout()),
    ("re:^out", "adamw", "out.weight", HIDDEN, "adamw", Layout()),
    (is_out, "adamw", "out.weight", HIDDEN, "adamw", Layout()),
    (is_out, "router", "out.weight", "router", "muon", Layout()),
    (is_out, "head", "out.weight", "head", "adamw", Layout()),
    ("qkv.weight", THIRDS, "qkv.weight", FUSED, "muon", THIRDS),
]


@pytest.mark.parametrize(
    ("key", "what", "name", "role", "optimizer", "layout"),
    OVERRIDES,
    ids=lambda x: getattr(x, "__name__", str(x)[:30]),
)
def test_the_users_word_goes_first(
    key: Any, what: Any, name: str, role: str, optimizer: str, layout: Layout
) -> None:
    row = rows(small(), overrides={key: what})[name]
    assert (row.role, row.rule, row.optimizer, row.layout) == (role, "override", optimizer, layout)
    others = rows(small(), overrides={key: what}).values()
    same = {"out.weight", "out.bias"} if key == "re:^out" else {name}
    assert {r.name for r in others if r.rule == "override"} == same


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_predicate() -> None:
    said = {is_out: "head", "re:out": "adamw", "out.weight": "router"}
    assert rows(small(), overrides=said)["out.weight"].role == "router"
    del said["out.weight"]
    assert rows(small(), overrides=said)["out.weight"].role == HIDDEN


def test_a_predicate_is_asked_of_a_parameter_without_a_name_under_an_empty_one() -> None:
    asked = []

    def is_matrix(name: str, parameter: torch.Tensor) -> bool:
        asked.append(name)
        return parameter.ndim == 2

    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((8, 8), (8,))]
    with pytest.warns(UserWarning, match="no model was given"):
        found = classify(parameters, ["", ""], overrides={is_matrix: "muon"})
    assert [row.optimizer for row in found] == ["muon", "adamw"]
    assert found[0].rule == "override"
    assert set(asked) == {""}


def test_a_tied_parameter_is_overridden_by_each_of_its_names() -> None:
    model = Named(embed=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.embed.weight  # type: ignore[union-attr, assignment]
    for name in ("embed.weight", "head.weight"):
        (row,) = rows(model, overrides={name: "muon"}).values()
        assert (row.name, row.optimizer) == ("embed.weight", "muon")


@pytest.mark.parametrize("key", ["module.embed.weight", "embed.weight"])
def test_a_module_that_the_user_calls_module_is_overridden_by_its_name(key: str) -> None:
    model = AroundIt(small())
    parameters = list(model.parameters())
    found = classify(parameters, [""] * len(parameters), model, overrides={key: "muon"})
    assert [row.name for row in found if row.rule == "override"] == ["module.embed.weight"]


BAD = [
    (["out.weight"], TypeError, "roles must be a mapping"),
    ({"out.weight": 3}, TypeError, "must be 'muon', 'adamw', a role's name or a Layout, got 3"),
    ({"out.weight": "Muon"}, ValueError, "(did you mean 'muon'?)"),
    ({"out.weigth": "muon"}, ValueError, "no parameter has that name; nearest: out.weight"),
    ({"re:(": "muon"}, ValueError, "is not a regular expression"),
    ({"re:nothing": "muon"}, ValueError, "roles['re:nothing'] matches no parameter"),
    ({lambda name, p: False: "muon"}, ValueError, "is true of no parameter"),
    ({3: "muon"}, TypeError, "a key of roles must be"),
    ({"out.bias": "muon"}, ValueError, "out.bias: a parameter of shape (4,) has no matrix"),
    ({"out.weight": THIRDS}, ValueError, "are not the 4 numbers"),
]


@pytest.mark.parametrize(("said", "error", "message"), BAD, ids=[r[2] for r in BAD])
def test_a_bad_override_is_one_clear_error(said: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        rows(small(), overrides=said)
    assert message in str(caught.value)
