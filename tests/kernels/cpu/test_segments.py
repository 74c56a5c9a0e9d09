"""Packed sequences: each gives what it gives alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from tests.support.cpu_kernel import TOLERANCE, needs_kernel
from tests.support.moba_cases import Case


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"padding": "holes"}, {"causal": False, "softcap": 2.0}, {"bias": "all", "scale": 0.3}],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_a_packed_sequence_gives_what_it_gives_alone_to_the_bit(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Off the grid, so that any other order of a sum would show; lengths are dense and sparse."""
    case = Case(batch=2, queries=900, length=900, dim=16, value_dim=24, block=32, topk=3, sinks=1)
    case = case.but(dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(torch.tensor([0.05, 0.08, 0.3, 0.57]), 1800, True, generator=generator)
    ids = ids.view(2, 900)  # interleaved
    ids[1], _ = ids[1].sort()  # one after the other
    q, k, v = (x * torch.rand((), dtype=dtype) for x in case.inputs())
    grad, grad_lse = torch.randn(q.shape[:3] + v.shape[3:]).to(dtype), torch.randn(q.shape[:3])
    mask, bias = case.key_mask(), case.key_bias()
    packing = case.arguments()._replace(segments=ids)
    out, lse = cpu.forward(q, k, v, packing)
    grads = cpu.backward(grad, grad_lse, q, k, v, out, lse, packing)
    packed = [x for x in (out, lse, *grads) if x is not None]
    for row, sequence in itertools.product(range(2), range(4)):
        at = ids[row].eq(sequence).nonzero().flatten()
        assert len(at) * case.group > 32, "a shorter one alone runs the path of a few queries"

        def alone(x: Tensor, row: int = row, at: Tensor = at) -> Tensor:
            return x[row : row + 1, :, at]

        arguments = case.arguments()._replace(
            key_mask=None if mask is None else mask[row : row + 1, at],
            key_bias=None if bias is None else alone(bias),
        )
        tensors = [alone(x) for x in (q, k, v)]
        out, lse = cpu.forward(*tensors, arguments)
        grads = cpu.backward(alone(grad), alone(grad_lse), *tensors, out, lse, arguments)
        single = [x for x in (out, lse, *grads) if x is not None]
        for name, mine, theirs in zip(
            ("out", "lse", "dq", "dk", "dv", "db"), packed, single, strict=False
        ):
            assert torch.equal(alone(mine), theirs), (name, row, sequence)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 3, 200])
def test_a_query_among_packed_sequences_selects_what_it_selects_alone(queries: int) -> None:
    """One query at a time, of interleaved sequences, with scores that differ in the last bit."""
    query = torch.randn(1, 4, 400, 33)
    key = torch.randn(1, 2, 1, 33) + 1e-6 * torch.randn(1, 2, 400, 33)
    value = torch.eye(400).expand(1, 2, 400, 400)  # names the keys that are attended
    bias = 1e-6 * torch.randn(1, 4, 400)
    ids = torch.arange(400)[None] % 3
    arguments = MobaArguments(8, 5, 1, scale=1e-3, key_bias=bias, segments=ids)
    full = cpu.forward(query, key, value, arguments)[0].gt(0)
    part = cpu.forward(query[:, :, 400 - queries :], key, value, arguments)[0].gt(0)
    assert full[..., -1, :].sum(-1).gt(32).all()
    assert torch.equal(part, full[:, :, 400 - queries :])
    arguments = arguments._replace(segments=ids.int())
    assert torch.equal(cpu.forward(query, key, value, arguments)[0].gt(0), full)


@needs_kernel
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_thousands_of_short_sequences_equal_the_reference_of_each(causal: bool) -> None:
    lengths = torch.randint(1, 13, (1000,), generator=torch.Generator().manual_seed(0))
    total = int(lengths.sum())
    ids = torch.arange(1000).mul(-(2**40)).repeat_interleave(lengths)[None]
    case = Case(batch=1, queries=total, length=total, causal=causal, block=2, topk=3, sinks=1)
    q, k, v = case.inputs()
    grad = torch.randint(-8, 9, q.shape) / 8
    arguments = case.arguments()._replace(segments=ids)
    out, lse = cpu.forward(q, k, v, arguments)
    grads = cpu.backward(grad, None, q, k, v, out, lse, arguments)[:3]
    for length in range(1, 13):  # all sequences of a length are one batch for the reference
        starts = (lengths.cumsum(0) - lengths)[lengths == length]
        at = starts[:, None] + torch.arange(length)
        leaves = [x[0, :, at].transpose(0, 1).clone().requires_grad_() for x in (q, k, v)]
        expected, expected_lse = reference.moba_attention(
            *leaves, MobaArguments(2, 3, sinks=1, causal=causal)
        )
        given = grad[0, :, at].transpose(0, 1)
        theirs = [expected, *torch.autograd.grad(expected, leaves, given)]
        for mine, their in zip((out, *grads), theirs, strict=True):
            mine = mine[0, :, at].transpose(0, 1)
            torch.testing.assert_close(mine, their, **TOLERANCE[torch.float32])
        torch.testing.assert_close(lse[0, :, at].transpose(0, 1), expected_lse)
