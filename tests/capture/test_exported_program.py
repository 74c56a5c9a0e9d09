"""An exported program's graph as the passes read it, and as a program again."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export

import moonfx
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
