"""Every place of a model that holds a parameter, inside wrappers, tied and shared."""

from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.parameter_sites import check_owned, innermost, is_flattened, sites_of
from tests.support.optim.roles import AroundIt, Named, roles, small


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (torch.compile, ""),
        (nn.DataParallel, ""),
        (lambda m: nn.DataParallel(torch.compile(m)), ""),
        (AroundIt, "module."),
    ],
    ids=["compile", "DataParallel", "both", "the user's own"],
)
def test_a_wrapped_model_has_the_roles_of_the_model(wrap: Any, prefix: str) -> None:
    def model() -> nn.Module:
        return Named(embed=nn.Embedding(9, 4), mlp=nn.Linear(4, 6), lm_head=nn.Linear(4, 9))

    plain, wrapped = roles(model()), roles(wrap(model()))
    assert wrapped == {prefix + name: role for name, role in plain.items()}


def test_a_compiled_layer_has_the_name_it_has_without() -> None:
    layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    plain = roles(layers)
    layers[0] = torch.compile(layers[0])
    assert roles(layers) == plain


def test_a_model_that_does_not_own_a_parameter_is_an_error_that_says_which() -> None:
    model, strange = small(), nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"does not own 1 of the .* 2 parameters: x \[3, 5\]"):
        classify([model.out.weight, strange], ["", "x"], model)  # type: ignore[list-item]


def test_shards_that_the_model_does_not_own_are_explained() -> None:
    flat = [nn.Parameter(torch.zeros(64))]
    with pytest.raises(ValueError, match="flattened shard .* use FSDP2"):
        classify(flat, [""], small())


def names(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter -> the names of all of its sites."""
    found = [[site.name for site in sites] for sites in sites_of(model).values()]
    return {each[0]: each for each in found}


def test_a_tied_weight_has_a_site_for_each_module_in_the_order_of_registration() -> None:
    model = Named(embed=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.embed.weight  # type: ignore[union-attr,assignment]
    assert names(model) == {"embed.weight": ["embed.weight", "head.weight"]}
    first, second = sites_of(model)[id(model.embed.weight)]  # type: ignore[union-attr]
    assert (first.module, first.parent, second.module) == (model.embed, model, model.head)


def test_a_shared_module_is_a_site_by_each_of_its_names() -> None:
    line = nn.Linear(4, 4, bias=False)
    assert names(Named(a=line, b=line)) == {"a.weight": ["a.weight", "b.weight"]}


def test_a_module_inside_itself_is_visited_once() -> None:
    model = Named(line=nn.Linear(4, 4, bias=False))
    model.add_module("again", model)
    assert names(model) == {"line.weight": ["line.weight"]}


def test_wrappers_are_in_no_name_and_a_users_own_module_is() -> None:
    model = Named(line=nn.Linear(4, 4, bias=False))
    assert names(nn.DataParallel(model)) == {"line.weight": ["line.weight"]}
    assert names(AroundIt(model)) == {"module.line.weight": ["module.line.weight"]}
    assert innermost(nn.DataParallel(torch.compile(model))) is model
    around = AroundIt(model)
    assert innermost(around) is around


def test_a_site_has_the_path_of_its_module_without_pefts_parts() -> None:
    inner = Named(modules_to_save=Named(default=nn.Linear(4, 4, bias=False)))
    (site,) = next(iter(sites_of(Named(score=inner)).values()))
    assert site.path == ["score"]


def test_many_strangers_are_counted_and_five_are_named() -> None:
    model = small()
    strangers = [nn.Parameter(torch.zeros(3, i + 1)) for i in range(7)]
    with pytest.raises(
        ValueError, match=r"7 of the optimizer's 7 .*parameter 4 \[3, 5\] and 2 more"
    ):
        check_owned(model, strangers, [""] * 7, sites_of(model))
    own = list(model.parameters())
    check_owned(model, own, [""] * len(own), sites_of(model))


def test_a_flattened_shard_is_known_by_its_name_or_its_mark() -> None:
    flat, whole = torch.zeros(64), torch.zeros(8, 8)
    assert is_flattened(flat, "_fsdp_wrapped_module._flat_param")
    assert not is_flattened(flat, "norm.weight")
    flat.ds_id = whole.ds_id = 1  # type: ignore[attr-defined]
    assert is_flattened(flat, "norm.weight")
    assert not is_flattened(whole, "line.weight")
