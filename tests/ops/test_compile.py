"""The operator in compiled and exported graphs."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moonfx import moba_attention
from tests.support.moba_cases import Case
from tests.support.moba_operator import OPERATOR, TOLERANCE, leaves_of


def loss(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    out, lse = moba_attention(
        query * 1.0, key, value, 8, 3, sinks=1, key_mask=key_mask, return_lse=True
    )
    return out.square().sum() + lse.masked_fill(lse.isneginf(), 0.0).sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph_with_the_same_gradients(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    # A second length: the same code when dynamic, else another compilation, worth it but once.
    lengths = [40] if backend == "inductor" and not dynamic else [40, 57]
    for length in lengths:
        case = Case(topk=3, length=length, queries=length, padding="left")
        leaves = [tensor.nan_to_num().requires_grad_() for tensor in case.inputs()]
        expected = loss(*leaves, case.key_mask())
        got = compiled(*leaves, case.key_mask())
        torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])
        for grad, want in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(grad, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_feature_compiles_in_one_graph_with_the_same_gradients(dynamic: bool) -> None:
    def function(*leaves: Tensor, segments: Tensor) -> Tensor:
        out, lse = moba_attention(
            *leaves[:3],
            8,
            3,
            scale=0.25,
            causal=False,
            softcap=2.0,
            key_bias=leaves[3],
            segments=segments,
            sink_logits=leaves[4],
            return_lse=True,
        )
        return out.square().sum() + lse.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (40, 57):
        case = Case(length=length, queries=length, bias="by head", packing="runs")
        leaves = [*leaves_of(case), case.key_bias().requires_grad_()]  # type: ignore[union-attr]
        leaves.append(torch.randn(4, requires_grad=True))
        expected = function(*leaves, segments=case.segments())
        got = compiled(*leaves, segments=case.segments())
        torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])
        for grad, want in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(grad, want, **TOLERANCE[torch.float32])


def test_five_lengths_take_two_graphs() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: moba_attention(q, k, v, 8, 2), backend=graphs, fullgraph=True
    )
    for length in (20, 24, 31, 64, 9):
        inputs = Case(length=length, queries=length).inputs()
        assert torch.equal(compiled(*inputs), moba_attention(*inputs, 8, 2))
    assert graphs.frame_count == 2


def test_every_length_fits_an_export_with_a_dynamic_length() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return moba_attention(query, key, value, 8, 2)

    length = torch.export.Dim("length", min=2, max=1024)
    shapes = ({2: length},) * 3
    program = torch.export.export(Module(), Case().inputs(), dynamic_shapes=shapes)
    found = [node for node in program.graph.nodes if node.target is OPERATOR.default]
    assert len(found) == 1
    for tokens in (3, 8, 57):
        inputs = Case(length=tokens, queries=tokens).inputs()
        assert torch.equal(program.module()(*inputs), moba_attention(*inputs, 8, 2))
