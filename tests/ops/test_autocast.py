"""The operator under autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx import moba_attention
from tests.support.moba_cases import Case
from tests.support.moba_operator import BACKWARD, OPERATOR, leaves_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_it_does_for_dense_attention(dtype: torch.dtype, compiled: bool) -> None:
    query, key, value = leaves_of(Case())
    mixed = (query, key.detach().to(dtype), value.detach().to(torch.bfloat16))

    def function(*inputs: Tensor) -> Tensor:
        return moba_attention(*inputs, 8, 2)

    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = moba_attention(query.to(dtype), key.to(dtype), value.to(dtype), 8, 2)
    with torch.autocast("cpu", dtype=dtype):
        dense = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        assert function(*mixed).dtype == dtype
        out = function(query, key, value)
    assert out.dtype == dense.dtype == dtype
    assert torch.equal(out, expected)
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert moba_attention(query, key, value, 8, 2).dtype == torch.float32


def test_autocast_leaves_the_bias_in_float32_and_its_gradient_too() -> None:
    case = Case(topk=3, bias="by head", scale=0.25, causal=False, softcap=2.0, packing="runs")
    leaves, named = leaves_of(case), case.named()
    bias = named["key_bias"] = named["key_bias"].requires_grad_()
    sink = torch.randn(4, requires_grad=True)
    halves = [leaf.bfloat16() for leaf in leaves]
    expected = moba_attention(*halves, 8, 3, **named, sink_logits=sink)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moba_attention(*leaves, 8, 3, **named, sink_logits=sink)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    wanted = torch.autograd.grad(expected.sum(), [bias, sink])
    for grad, want in zip(torch.autograd.grad(out.sum(), [bias, sink]), wanted, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want)


@pytest.mark.usefixtures("kernel")
def test_autocast_does_not_reach_into_a_kernel() -> None:
    inputs = [torch.randn(1, heads, 300, 16).bfloat16() for heads in (4, 2, 2)]
    saved = OPERATOR(*inputs, 16, 3)
    grads = BACKWARD(saved[0], None, *inputs, *saved, 16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = OPERATOR(*inputs, 16, 3)
        grads_again = BACKWARD(saved[0], None, *inputs, *saved, 16, 3)
    both = zip((*saved, *grads), (*again, *grads_again), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
