"""Roles without a trace: by module types, by names, by shapes; overrides; what a model must own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import ROLES, RoleRow, Roles, row_of

FUSED, HIDDEN = "fused projection", "hidden matrix"


def rows(model: nn.Module, **given: Any) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {row.name: row for row in classify(parameters, names, model, **given)}


def roles(model: nn.Module, **given: Any) -> dict[str, str]:
    return {name: row.role for name, row in rows(model, **given).items()}


def nameless(named: dict[str, tuple[int, ...]], **given: Any) -> dict[str, RoleRow]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in named.values()]
    with pytest.warns(UserWarning, match="neither tied weights, nor which matrix produces"):
        found = classify(parameters, list(named), **given)
    return dict(zip(named, found, strict=True))


class Named(nn.Module):
    """Modules under the names given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


# --- module types ---------------------------------------------------------------------------------

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


class AroundIt(nn.Module):
    """A wrapper of the user's own, which holds the model under the word that DDP uses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


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


# --- names and shapes -----------------------------------------------------------------------------

NAMES = [
    # name, shape, role, rule
    ("transformer.wte.weight", (99, 64), "embedding", "name"),
    ("transformer.wpe.weight", (99, 64), "position embedding", "name"),
    ("module._orig_mod.lm_head.weight", (99, 64), "head", "name"),
    ("shared.weight", (99, 64), "embedding", "name"),
    ("output.weight", (99, 64), "head", "name"),
    ("layers.0.attention.output.weight", (64, 64), HIDDEN, "shape"),
    ("decoder.multihead_attn.in_proj_weight", (192, 64), HIDDEN, "shape"),
    ("classifier.weight", (10, 64), "head", "name"),
    ("score.weight", (10, 64), "head", "name"),
    ("fc.weight", (10, 64), "head", "name"),
    ("h.0.ln_1.weight", (64,), "norm gain", "name"),
    ("h.0.ln_1.bias", (64,), "bias", "name"),
    ("layers.0.mixer.A_log", (64, 16), "scan parameter", "name"),
    ("layers.0.mixer.x_proj.weight", (40, 64), HIDDEN, "shape"),
    ("q_proj.lora_A.default.weight", (8, 64), "LoRA", "name"),
    ("parametrizations.weight.original0", (64, 1), "weight norm", "name"),
    ("mlp.experts.gate_up_proj", (4, 64, 32), "experts", "name"),
    ("mlp.gate_up_proj", (4, 64, 32), "unclear", "shape"),
    ("conv.weight", (8, 4, 3, 3), "convolution", "shape"),
    ("vit.pos_embed", (1, 17, 64), "position embedding", "name"),
    ("vit.cls_token", (1, 1, 64), "thin matrix", "shape"),
    ("", (64, 64), HIDDEN, "shape"),
    ("", (50000, 64), "embedding", "shape"),
    ("", (256, 64), HIDDEN, "shape"),
    ("", (64,), "vector", "shape"),
    ("", (64, 1), "thin matrix", "shape"),
    ("", (), "vector", "shape"),
    ("_fsdp_wrapped_module._flat_param", (4096,), "vector", "name"),
]


@pytest.mark.parametrize(
    ("name", "shape", "role", "rule"), NAMES, ids=[f"{r[0]} {r[1]}" for r in NAMES]
)
def test_without_a_model_names_and_shapes_decide(
    name: str, shape: Any, role: str, rule: str
) -> None:
    row = nameless({name: shape})[name]
    assert (row.role, row.rule, row.optimizer) == (role, rule, ROLES[role].optimizer)


def test_flattened_shards_are_explained() -> None:
    row = nameless({"_fsdp_wrapped_module._flat_param": (4096,)})
    assert "use_orig_params=True" in row["_fsdp_wrapped_module._flat_param"].why


# --- overrides ------------------------------------------------------------------------------------


def small() -> Named:
    return Named(
        embed=nn.Embedding(9, 4), qkv=nn.Linear(4, 12), out=nn.Linear(4, 4), norm=nn.LayerNorm(4)
    )


def is_out(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("out") and parameter.ndim == 2


THIRDS = Layout(sizes=(4, 4, 4))
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


# --- what a model must own ------------------------------------------------------------------------


def test_a_model_that_does_not_own_a_parameter_is_an_error_that_says_which() -> None:
    model, strange = small(), nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"does not own 1 of the .* 2 parameters: x \[3, 5\]"):
        classify([model.out.weight, strange], ["", "x"], model)  # type: ignore[list-item]


def test_shards_that_the_model_does_not_own_are_explained() -> None:
    flat = [nn.Parameter(torch.zeros(64))]
    with pytest.raises(ValueError, match="flattened shard .* use FSDP2"):
        classify(flat, [""], small())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, "model must be a torch.nn.Module or None, got str"),
        ({"example": torch.zeros(1)}, TypeError, "example must be a tuple of positional or a dict"),
        ({"example": ()}, ValueError, "example needs model="),
    ],
)
def test_bad_input_is_one_clear_error(given: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        classify([nn.Parameter(torch.zeros(2, 2))], [""], **given)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_shows_each_row_and_counts_those_on_muon() -> None:
    table = Roles(list(rows(small(), overrides={"qkv.weight": THIRDS}).values()))
    assert len(table) == len(table.rows) == len(table.to_dict()["rows"]) == 7
    assert "fused projection 1 x (4 + 4 + 4)" in str(table)
    assert str(table).endswith("2 of 7 parameters on Muon")
    assert table.to_dict()["rows"][1]["layout"]["sizes"] == (4, 4, 4)


def test_a_row_says_why_it_is_on_its_optimizer() -> None:
    from moonfx.optim.roles.table import Finding

    row = row_of("x", [3, 4], Finding("head", "seen", Layout(sizes=(1, 2))), "graph")
    assert row == RoleRow("x", (3, 4), "head", "graph", "adamw", f"seen; {ROLES['head'].why}")
