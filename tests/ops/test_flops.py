"""The FLOP formulas against a count of the keys that the reference attends."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moonfx import moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from moonfx.ops import flops
from tests.support.moba_cases import Case


def leaves_of(case: Case) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in case.inputs()]


SIZES = [
    (1, 1, 8, 2),
    (5, 5, 8, 2),
    (40, 40, 8, 2),
    (40, 40, 8, 1),
    (37, 37, 8, 3),
    (9, 61, 8, 2),
    (1, 64, 8, 3),
    (1, 65, 8, 3),
    (50, 50, 7, 3),
    (12, 30, 1, 4),
    (40, 40, 8, 9),
]


@pytest.mark.parametrize(("queries", "length", "block", "topk"), SIZES)
def test_flops_are_those_of_the_keys_attended(
    queries: int, length: int, block: int, topk: int
) -> None:
    case = Case(
        queries=queries, length=length, block=block, topk=topk, dim=8, value_dim=4, scale=1.0
    )
    leaves = leaves_of(case)
    chosen = reference.select_blocks(*leaves[:2], MobaArguments(block, topk))
    keys = chosen.repeat_interleave(block, -1)[..., :length]
    keys &= torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    attended = int(keys.sum())
    heads = case.batch * case.kv_heads * case.group
    assert flops.attended_keys(queries, length, block, topk) * heads == attended

    with FlopCounterMode(display=False) as forward:
        out = moba_attention(*leaves, block, topk)
    assert forward.get_total_flops() == attended * 2 * (8 + 4)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == attended * (6 * 8 + 4 * 4)


@pytest.mark.parametrize(("length", "block", "topk"), [(40, 8, 2), (48, 16, 9), (64, 8, 1)])
def test_flops_of_bidirectional_attention_are_those_of_topk_full_blocks(
    length: int, block: int, topk: int
) -> None:
    case = Case(queries=length, length=length, block=block, topk=topk, dim=8, value_dim=4)
    leaves = leaves_of(case)
    chosen = reference.select_blocks(*leaves[:2], MobaArguments(block, topk, causal=False))
    attended = int(chosen.sum()) * block
    heads = case.batch * case.kv_heads * case.group
    assert flops.attended_keys(length, length, block, topk, causal=False) * heads == attended
    with FlopCounterMode(display=False) as forward:
        out = moba_attention(*leaves, block, topk, causal=False)
    assert forward.get_total_flops() == attended * 2 * (8 + 4)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == attended * (6 * 8 + 4 * 4)


def test_backward_flops_are_two_and_a_half_times_the_forward() -> None:
    shape = torch.Size((2, 4, 40, 8))
    forward = flops.forward_flops(shape, shape, shape, 8, 2, out_val=None)
    backward = flops.backward_flops(*[shape] * 8, 8, 2, out_val=None)
    assert backward * 2 == forward * 5
