"""Roles by module types: heads, tied weights, wrappers."""

import copy

import pytest
from torch import nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import ROLES
from tests.support.optim.roles import (
    FUSED,
    HIDDEN,
    Named,
    nameless,
    roles,
    rows,
)

MODULES = [
    # name, model, the role of each parameter by module type
    ("linear", nn.Linear(4, 6), {"weight": HIDDEN, "bias": "bias"}),
    ("embedding", Named(x=nn.Embedding(9, 4)), {"x.weight": "embedding"}),
    ("positions", Named(wpe=nn.Embedding(9, 4)), {"wpe.weight": "position embedding"}),
    ("layer norm", nn.LayerNorm(4), {"weight": "norm gain", "bias": "bias"}),
    ("RMS norm", nn.RMSNorm(4), {"weight": "norm gain"}),
    ("batch norm", nn.BatchNorm2d(4), {"weight": "norm gain", "bias": "bias"}),
    ("thin row", nn.Linear(4, 1, bias=False), {"weight": "thin matrix"}),
    ("thin column", nn.Linear(1, 4, bias=False), {"weight": "thin matrix"}),
    (
        "convolutions",
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)),
        {
            "0.weight": "first convolution",
            "0.bias": "bias",
            "1.weight": "depthwise convolution",
            "1.bias": "bias",
            "2.weight": "convolution",
            "2.bias": "bias",
        },
    ),
    (
        "grouped, but not by channel",
        nn.Sequential(nn.Conv1d(3, 8, 1, bias=False), nn.Conv1d(8, 8, 3, groups=4, bias=False)),
        {"0.weight": "first convolution", "1.weight": "convolution"},
    ),
    (
        "nn.MultiheadAttention called as a head",  # no substring of a name makes a head
        Named(multihead_attn=nn.MultiheadAttention(4, 2, add_bias_kv=True)),
        {
            "multihead_attn.in_proj_weight": FUSED,
            "multihead_attn.in_proj_bias": "bias",
            "multihead_attn.bias_k": "bias",
            "multihead_attn.bias_v": "bias",
            "multihead_attn.out_proj.weight": HIDDEN,
            "multihead_attn.out_proj.bias": "bias",
        },
    ),
    (
        "attention with keys of another width",
        nn.MultiheadAttention(4, 2, kdim=6, vdim=6, bias=False),
        dict.fromkeys(
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"], HIDDEN
        ),
    ),
    (
        "LSTM",
        nn.LSTM(4, 6),
        {"weight_ih_l0": FUSED, "weight_hh_l0": FUSED, "bias_ih_l0": "bias", "bias_hh_l0": "bias"},
    ),
    (
        "classifier of several layers",
        Named(classifier=nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))),
        {"classifier.0.weight": HIDDEN, "classifier.1.weight": "head"},
    ),
    (
        "the last Linear as wide as the vocabulary",
        Named(a=nn.Embedding(9, 4), b=nn.Linear(4, 9, bias=False), c=nn.Linear(4, 9, bias=False)),
        {"a.weight": "embedding", "b.weight": HIDDEN, "c.weight": "head"},
    ),
    (
        "as many positions and buckets as features",
        Named(
            tokens=nn.Embedding(9, 4),
            wpe=nn.Embedding(4, 4),
            relative_attention_bias=nn.Embedding(6, 2),
            up=nn.Linear(4, 6, bias=False),
            down=nn.Linear(6, 4, bias=False),
        ),
        {
            "tokens.weight": "embedding",
            "wpe.weight": "position embedding",
            "relative_attention_bias.weight": "position embedding",
            "up.weight": HIDDEN,
            "down.weight": HIDDEN,
        },
    ),
    (
        "buckets before the last Linear",
        Named(
            tokens=nn.Embedding(9, 4),
            relative_attention_bias=nn.Embedding(6, 2),
            up=nn.Linear(4, 6, bias=False),
        ),
        {
            "tokens.weight": "embedding",
            "relative_attention_bias.weight": "position embedding",
            "up.weight": HIDDEN,
        },
    ),
    (
        "weight norm",
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False)),
        {
            "parametrizations.weight.original0": "weight norm",
            "parametrizations.weight.original1": "weight norm",
        },
    ),
    (
        "router beside experts, and a gate that is none",
        Named(
            moe=Named(gate=nn.Linear(4, 2, bias=False), experts=nn.ModuleList()),
            mlp=Named(gate=nn.Linear(4, 2, bias=False)),
        ),
        {"moe.gate.weight": "router", "mlp.gate.weight": HIDDEN},
    ),
]


@pytest.mark.parametrize(
    ("model", "expected"), [r[1:] for r in MODULES], ids=[r[0] for r in MODULES]
)
def test_module_types_say_what_each_parameter_is(model: nn.Module, expected: dict) -> None:
    found = rows(model)
    assert {name: row.role for name, row in found.items()} == expected
    assert {row.rule for row in found.values()} == {"module"}
    for row in found.values():
        assert row.optimizer == ROLES[row.role].optimizer


def test_a_grouped_convolution_is_a_matrix_for_each_group() -> None:
    layers = nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=4), nn.Conv1d(8, 4, 1, groups=4)
    )
    found = rows(layers)
    assert found["1.weight"].layout == Layout("flatten", outer=4)
    assert (found["2.weight"].role, found["2.weight"].optimizer) == ("thin matrix", "adamw")


@pytest.mark.parametrize("path", ["patch_embed", "to_patch_embedding", "patch_embeddings"])
def test_a_linear_map_of_patches_is_with_the_first_convolution(path: str) -> None:
    parts = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6, bias=False))
    found = rows(Named(**{path: parts}))
    assert found[f"{path}.1.weight"].role == "patch embedding"
    assert found[f"{path}.1.weight"].optimizer == "adamw"
    assert found[f"{path}.0.weight"].role == "norm gain"


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "score", "classifier", "fc", "output"])
def test_heads_go_by_many_names(name: str) -> None:
    assert roles(Named(**{name: nn.Linear(4, 6, bias=False)})) == {f"{name}.weight": "head"}


@pytest.mark.parametrize("name", ["multihead_attn", "headless", "overhead", "score_net", "fc1"])
def test_no_part_of_a_word_makes_a_head(name: str) -> None:
    assert roles(Named(**{name: nn.Linear(4, 6, bias=False)})) == {f"{name}.weight": HIDDEN}


@pytest.mark.parametrize("first", ["encoder", "decoder"])
def test_tied_weights_are_found_in_either_order_of_registration(first: str) -> None:
    parts = {"encoder": nn.Embedding(9, 4), "decoder": nn.Linear(4, 9, bias=False)}
    parts["decoder"].weight = parts["encoder"].weight
    second = ({*parts} - {first}).pop()
    model = Named(**{first: parts[first], second: parts[second]})
    (row,) = rows(model).values()
    assert (row.name, row.role, row.optimizer) == (f"{first}.weight", "tied head", "adamw")


def test_beside_a_tied_head_the_last_linear_is_none() -> None:
    model = Named(a=nn.Embedding(4, 4), b=nn.Linear(4, 4, bias=False), c=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    assert roles(model) == {"a.weight": "tied head", "c.weight": HIDDEN, "c.bias": "bias"}


def test_beside_output_embeddings_the_last_linear_is_none() -> None:
    class Said(Named):
        def get_output_embeddings(self) -> nn.Module:
            return self.b

    bare = {"bias": False}
    model = Said(a=nn.Embedding(4, 4), b=nn.Linear(4, 4, **bare), c=nn.Linear(4, 4, **bare))
    assert roles(model) == {"a.weight": "embedding", "b.weight": "head", "c.weight": HIDDEN}


class SavedByPeft(nn.Module):
    """What peft puts around a module that is trained beside the adapters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})


@pytest.mark.parametrize("head", ["classifier", "score", "fc"])
def test_a_head_that_peft_saves_is_a_head(head: str) -> None:
    """By module and by name; `fc` is a head on top alone."""
    saved = SavedByPeft(nn.Linear(4, 6, bias=False))
    within = Named(mlp=nn.Linear(4, 4, bias=False), **{head: saved})
    found = roles(Named(base_model=Named(model=within)))
    front = f"base_model.model.{head}."
    heads = dict.fromkeys(
        [front + "original_module.weight", front + "modules_to_save.default.weight"], "head"
    )
    assert found == {"base_model.model.mlp.weight": HIDDEN} | heads
    named = nameless(dict.fromkeys(found, (6, 4)))
    assert {name: row.role for name, row in named.items()} == found


def test_two_linears_of_one_weight_are_no_tied_head() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert roles(Named(a=a, b=b)) == {"a.weight": HIDDEN}
