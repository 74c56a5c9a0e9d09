"""An exported program's graph as the passes read it, and as a program again."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export

import moonfx
from moonfx.capture.exported_program import capture_exported, exported_again, exported_modules
from moonfx.capture.graph_nodes import buffer_value, input_name, placeholders
from moonfx.passes.graph.aliases import last_writes
from tests.support.front_ends import (
    by_matmul,
    by_module,
    by_sdpa,
    exported,
    inputs,
)


class OnlyAttention(nn.Module):
    """The attention is the graph's own output, whose name is in the signature."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return q + 1, F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_an_attention_that_is_the_programs_output_keeps_the_signature_true() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    program = moonfx.sparsify(export(OnlyAttention(), (q, k, v)), 8, 3)
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    names = [spec.arg.name for spec in program.graph_signature.output_specs]
    assert names == [n.name for n in output.args[0]]
    expected = moonfx.moba_attention(q, k, v, 8, 3, sinks=1)
    torch.testing.assert_close(program.module()(q, k, v)[1], expected)


@pytest.mark.parametrize("form", [by_matmul, by_sdpa], ids=["matmul", "sdpa"])
def test_a_decomposed_program_is_rewritten(form: Callable[..., Tensor]) -> None:
    """scaled_dot_product_attention decomposes to the flash attention of the CPU."""
    sparse = moonfx.sparsify(exported(form).run_decompositions(), 8, 3)
    assert len(moonfx.report(sparse).rewritten) == 2
    expected, _ = by_module(form)
    torch.testing.assert_close(sparse.module()(*inputs()), expected, atol=2e-6, rtol=1e-5)


class WithBuffers(nn.Module):
    """A parameter, a buffer that stays, one that is written, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2, bias=False)
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.line(x) * self.mask + torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("decomposed", [False, True])
def test_inputs_are_named_and_a_buffer_is_known_unless_it_is_written(decomposed: bool) -> None:
    program = export(WithBuffers(), (torch.ones(3, 2),))
    program = program.run_decompositions() if decomposed else program
    before = str(program.graph)
    graph = capture_exported(program).gm.graph
    found = {input_name(n): n for n in placeholders(graph)}
    assert buffer_value(found[True, "line.weight"]) is None
    assert buffer_value(found[True, "mask"]) is program.state_dict["mask"]
    assert buffer_value(found[False, "x"]) is None
    # Where the write is a node of the graph, the passes see it by themselves.
    calls = found[True, "calls"]
    assert buffer_value(calls) is None or calls in last_writes(graph)
    assert str(program.graph) == before


def test_a_program_captured_and_written_again_is_as_it_was() -> None:
    program = export(WithBuffers(), (torch.ones(3, 2),))
    again = exported_again(capture_exported(program))
    x = torch.ones(3, 2)
    torch.testing.assert_close(again.module()(x), program.module()(x))
    assert str(again.graph_signature) == str(program.graph_signature)
    assert not any(key.startswith("moonfx") for n in again.graph.nodes for key in n.meta)


def test_the_modules_of_a_program_are_named() -> None:
    assert exported_modules(exported(by_matmul)) >= {"", "embed", "layers.0", "layers.1.qkv"}
