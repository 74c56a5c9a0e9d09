"""Retracing to pre-dispatch ATen changes nothing but the attention."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from moonfx.capture.graph_nodes import module_path, source_line
from moonfx.capture.retrace import capture
from tests.support.tiny import TinyLM, gradients, tokens


class Stateful(TinyLM):
    """Dropout, batch statistics, a counter written in place, and a view returned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = F.dropout(self.embed(tokens), 0.3, self.training)
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.head(x), x[:, -1]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_random_numbers_buffers_and_views_are_as_without_moonfx(compiler: str) -> None:
    dense, sparse, x = Stateful(), Stateful(), tokens()
    sparse.load_state_dict(dense.state_dict())
    moonfx.sparsify(sparse, 16, 6, compiler=compiler)
    for _ in range(2):
        torch.manual_seed(1)
        expected = dense(x)
        torch.manual_seed(1)
        found = sparse(x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
        wanted = gradients(dense, expected[0].square().sum())
        for name, grad in gradients(sparse, found[0].square().sum()).items():
            # float32 sums in another order, through a batch norm.
            torch.testing.assert_close(grad, wanted[name], atol=1e-3, rtol=1e-3, msg=name)
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(dict(sparse.named_buffers())[name], buffer, msg=name)
    assert int(sparse.calls) == 2
    assert len(moonfx.report(sparse).rewritten) == 2


def captured(model: nn.Module, x: Tensor, dynamic: bool = False) -> torch.fx.GraphModule:
    found: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        found.append(capture(gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(x)
    return found[0]


def test_a_captured_graph_holds_single_nodes_names_lines_and_its_inputs_names() -> None:
    gm = captured(TinyLM(), tokens())
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    nodes = [n for n in gm.graph.nodes if n.target is sdpa]
    assert [module_path(n, {}, "") for n in nodes] == ["layers.0", "layers.1"]
    assert {source_line(n).split(":")[0] for n in nodes} == {"tiny.py"}
    lines = Path(TinyLM.__init__.__code__.co_filename).read_text().splitlines()
    assert "scaled_dot_product_attention" in lines[int(source_line(nodes[0]).split(":")[1]) - 1]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    assert any("tokens" in n for n in names), names


def test_a_captured_graph_keeps_its_symbolic_sizes() -> None:
    gm = captured(TinyLM(), tokens(), dynamic=True)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    node = next(n for n in gm.graph.nodes if n.target is sdpa)
    batch, heads, length, head_dim = node.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(length, torch.SymInt)
    assert (heads, head_dim) == (4, 8)
