"""A policy per layer: how a layer finds its own, and what a graph break makes of it."""

import copy
import re

import pytest
import torch

import moonfx
from moonfx import LayerPolicy
from moonfx.ops import moba
from tests.support.tiny import TinyLM, tokens

EAGER = {"compiler": "eager"}

LAYERS = [
    # layers, the policy of each of the four attentions ("" dense)
    ({"layers.1": None}, ["16/2/1", "", "16/2/1", "16/2/1"]),
    ({"layers": None, "layers.2": LayerPolicy(8, 4)}, ["", "", "8/4/1", ""]),
    ({r"re:layers\.[23]$": LayerPolicy(8, 3, 0)}, ["16/2/1", "16/2/1", "8/3/0", "8/3/0"]),
    ({0: None, 3: LayerPolicy(8, 5)}, ["", "16/2/1", "16/2/1", "8/5/1"]),
    # name before regex before index
    (
        {"layers.0": LayerPolicy(8, 4), "re:layers": None, 0: LayerPolicy(4, 4)},
        ["8/4/1", "", "", ""],
    ),
    ({"re:0": LayerPolicy(8, 4), 0: None}, ["8/4/1", "16/2/1", "16/2/1", "16/2/1"]),
]


@pytest.mark.parametrize(("layers", "expected"), LAYERS)
def test_a_layer_finds_its_policy_by_name_then_regex_then_index(layers, expected) -> None:
    model = moonfx.sparsify(TinyLM(layers=4), 16, 2, layers=layers, **EAGER)
    model(tokens())
    rows = moonfx.report(model).rows
    assert [r.layer for r in rows] == [f"layers.{i}" for i in range(4)]
    assert [str(r.policy or "") for r in rows] == expected


@pytest.mark.parametrize("given", [False, True])
def test_recompute_routing_reaches_every_attention(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = moba.routes_to_keep, []

    def record(*arguments):  # type: ignore[no-untyped-def]
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(moba, "routes_to_keep", record)
    model, x = TinyLM(), tokens()
    plain = moonfx.sparsify(copy.deepcopy(model), 16, 2, **EAGER)(x)
    assert asked == [False, False]
    out = moonfx.sparsify(model, 16, 2, recompute_routing=given, **EAGER)(x)
    assert asked[2:] == [given, given]
    assert torch.equal(out, plain)


def test_a_shared_module_goes_by_each_of_its_names() -> None:
    model = TinyLM(layers=2)
    model.alias = model.layers[1]
    moonfx.sparsify(model, 16, 2, layers={"alias": None}, **EAGER)
    model(tokens())
    assert [r.action for r in moonfx.report(model).rows] == ["sparse", "kept dense"]


class BreaksInTheMiddle(TinyLM):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.layers[0](x)
        torch._dynamo.graph_break()
        x = x + self.layers[1](x)
        return self.head(x)


def test_a_break_in_the_models_own_forward_keeps_policies_per_layer() -> None:
    model = moonfx.sparsify(BreaksInTheMiddle(), 16, 2, layers={"layers.1": None}, **EAGER)
    model(tokens())
    actions = {r.layer: r.action for r in moonfx.report(model).rows}
    assert actions == {"layers.0": "sparse", "layers.1": "kept dense"}


def test_dense_last_over_several_graphs_is_an_error() -> None:
    model = moonfx.sparsify(BreaksInTheMiddle(), 16, 2, dense_last=1, **EAGER)
    with pytest.raises(Exception, match=r"needs the whole model in one graph[\s\S]*layers="):
        model(tokens())


class AroundAttention(torch.nn.Module):
    """A graph break on either side of an attention: its graph holds no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for line in self.lines:
            q = line(x)
            torch._dynamo.graph_break()
            x = attend(q)
            torch._dynamo.graph_break()
        return x


def attend(q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_an_attention_in_a_graph_of_no_known_layer_stays_dense_when_policies_differ() -> None:
    model, x = AroundAttention(), torch.randn(1, 2, 64, 8)
    dense = model(x)
    moonfx.sparsify(model, 8, 2, layers={0: None}, **EAGER)
    with pytest.warns(UserWarning, match="a graph break makes several layers share one graph"):
        assert torch.equal(model(x), dense)
    moonfx.sparsify(model, 8, 2, **EAGER)
    assert (model(x) - dense).abs().max() > 1e-3


def test_dense_last_keeps_the_last_attentions_dense() -> None:
    model = moonfx.sparsify(TinyLM(layers=4), 16, 2, dense_last=3, **EAGER)
    model(tokens())
    actions = [r.action for r in moonfx.report(model).rows]
    assert actions == ["sparse", "kept dense", "kept dense", "kept dense"]


class Broken(TinyLM):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
            torch._dynamo.graph_break()
        return self.head(x)


def test_layers_that_a_graph_break_puts_in_one_shared_graph_are_all_sparse() -> None:
    model, x = Broken(layers=3), tokens()
    dense = model(x)
    expected = moonfx.sparsify(_unbroken(model), 16, 2, **EAGER)(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    torch.testing.assert_close(model(x), expected, atol=2e-6, rtol=1e-5)
    assert (expected - dense).abs().max() > 1e-3
    assert [r.layer for r in moonfx.report(model).rewritten] == ["layers.0"]


@pytest.mark.parametrize("policy", [dict(layers={0: None}), dict(dense_last=1)])
def test_layers_that_share_a_graph_stay_dense_when_policies_differ(policy) -> None:
    """Dynamo would run the graph made for layer 0, dense, in the layers that asked for sparse."""
    model, x = Broken(layers=3), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **policy, **EAGER)
    with pytest.warns(UserWarning, match=r"a graph break makes layers.0[\s\S]*mend the break"):
        assert torch.equal(model(x), dense)


def _unbroken(model: Broken) -> TinyLM:
    whole = TinyLM(layers=3)
    whole.load_state_dict(model.state_dict())
    return whole


def test_a_layers_key_that_fits_no_attention_is_not_silent() -> None:
    model = moonfx.sparsify(TinyLM(), 16, 2, layers={"head": None, 7: None}, **EAGER)
    with pytest.warns(UserWarning, match=re.escape("fits layers['head', 7]")):
        model(tokens())
