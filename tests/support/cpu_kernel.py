"""What the tests of the C++ kernel share: how near the reference it has to be, what it chooses."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case

needs_kernel = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


# float32: sums of some hundred products, and an exponential good to 1e-7, of values up to 10.
# The others: one rounding of the result on each side, the weights' rounding, a delta taken from the
# rounded output: two units in the last place (2**-7, 2**-10), or of the largest term of a sum.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}


# ALiBi's lse goes to 90: its own rounding, 4e-6, changes all of a query's weights in backward.
ALIBI = {"rtol": 1e-5, "atol": 1e-4}


DTYPES = list(TOLERANCE)


def assert_like_reference(case: Case, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    tensors = inputs or case.inputs()
    uneven = case.padding != "none" or case.packing != "none" or case.length % case.block
    if not case.causal and uneven:
        # A candidate may then have any number of keys, and its mean be inexact: no ties, please.
        generator = torch.Generator().manual_seed(case.seed)
        drawn = (torch.rand(x.shape, generator=generator) for x in tensors)
        query, key, value = ((x * y).to(x) for x, y in zip(tensors, drawn, strict=True))
        tensors = query, key, value
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    named = case.named()
    if (bias := case.key_bias()) is not None:  # unbroadcast, as the kernel's gradient is
        bias = bias.expand(*leaves[0].shape[:2], case.length).double().requires_grad_()
        named["key_bias"] = bias
    variables = leaves if bias is None else [*leaves, bias]
    out, lse = reference.moba_attention(*leaves, MobaArguments(case.block, case.topk, **named))
    grad_out = torch.randint(-8, 9, out.shape) / 8
    grad_lse = torch.randint(-8, 9, lse.shape) / 8
    expected = torch.autograd.grad((out, lse), variables, (grad_out, grad_lse))
    got, got_lse = cpu.forward(*tensors, case.arguments())
    *grads, grad_bias = cpu.backward(
        grad_out.to(case.dtype), grad_lse, *tensors, got, got_lse, case.arguments()
    )
    assert (grad_bias is None) == (bias is None)
    if grad_bias is not None:
        grads.append(grad_bias)
    names = ("out", "lse", "dq", "dk", "dv", "db")[: 2 + len(grads)]
    tolerance = TOLERANCE | ({torch.float32: ALIBI} if case.bias == "alibi" else {})
    for name, mine, theirs in zip(
        names, (got, got_lse, *grads), (out, lse, *expected), strict=True
    ):
        dtype = torch.float32 if name in ("lse", "db") else case.dtype
        assert mine.dtype == dtype, name
        torch.testing.assert_close(
            *(mine.double(), theirs),
            **tolerance[torch.float32 if name == "lse" else case.dtype],
            msg=partial("{}: {}".format, name),
        )


def chosen(
    query: Tensor, key: Tensor, block: int, topk: int, sinks: int, causal: bool = True
) -> Tensor:
    """Which blocks the kernel attends, bool [B, Hq, Nq, n]: V names each key's block."""
    blocks = -(-key.shape[2] // block)
    value = torch.eye(blocks).repeat_interleave(block, 0)[: key.shape[2]]
    value = value.expand(*key.shape[:2], *value.shape)
    return cpu.forward(
        query, key, value, MobaArguments(block, topk, sinks, scale=0.0, causal=causal)
    )[0].gt(0)
