"""Attention on tensors of a subclass has its row in the report, and runs as it was written."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor

import moonfx
from moonfx.passes.attention import find_attention
from moonfx.passes.context import Context
from moonfx.policy import LayerPolicy
from tests.passes.attention.forms import outcome

OF_TWO = "attention of TwoTensors is not read, whose inside no pass sees: call it on plain tensors"


class Layer(nn.Module):
    """Self-attention of [B, N, 8] with two heads."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Any) -> Any:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)


class Both(nn.Module):
    """One attention of what it is given, and one of plain tensors."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.given, self.plain = Layer(form), Layer("sdpa")

    def forward(self, x: Any, y: Tensor) -> tuple[Any, Tensor]:
        return self.given(x), self.plain(y)


@pytest.mark.parametrize("form", ["sdpa", "by hand"])
def test_attention_of_a_subclass_is_declined_by_name_beside_a_plain_one(form: str) -> None:
    model, x = Both(form), TwoTensor(torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    dense = model(x, x.a)
    moonfx.sparsify(model, 4, 2, causal_only=False, compiler="aot_eager")
    sparse = model(x, x.a)
    report = moonfx.report(model)
    assert sorted((r.layer, o) for r, o in zip(report.rows, outcome(report), strict=True)) == [
        ("given", OF_TWO),
        ("plain", "all"),
    ]
    assert torch.equal(sparse[0].a, dense[0].a)
    assert torch.equal(sparse[0].b, dense[0].b)
    assert not torch.allclose(sparse[1], dense[1], atol=1e-4)


def jagged() -> Tensor:
    parts = [torch.randn(n, 8) for n in (5, 12, 9)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_jagged_batch_runs_as_it_was() -> None:
    """On a CPU torch breaks the graph at the attention itself, which is in none then."""
    model, x = Layer("sdpa"), jagged()
    dense = model(x)
    moonfx.sparsify(model, 4, 2, causal_only=False, compiler="aot_eager", on_miss="ignore")
    sparse = model(x)
    assert moonfx.report(model).failures == []
    assert torch.equal(sparse.values(), dense.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_attention_of_jagged_tensors_in_a_graph_is_declined_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(F.scaled_dot_product_attention, (x, x, x))
    graph.output(y)
    x.meta["val"] = y.meta["val"] = jagged().unflatten(-1, (2, 4)).transpose(1, 2)
    gm = fx.GraphModule({}, graph)
    context = Context(gm, lambda site, sites, root: LayerPolicy())
    find_attention.run(gm.graph, context)
    ((form, reason),) = [(site.form, str(site.reject)) for site in context.sites]
    assert form == "scaled_dot_product_attention"
    assert reason.startswith("attention of jagged nested tensors is not read: pack the sequences")
