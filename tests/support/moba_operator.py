"""The two operators, their leaves and how near the reference they have to be."""

import torch
from torch import Tensor

from tests.support.moba_cases import Case

OPERATOR = torch.ops.moonfx.moba_attention


BACKWARD = torch.ops.moonfx.moba_attention_backward


# float32: sums of at most 100 products of size 1. float16 is computed in float32 and rounded once:
# two units in the last place. bfloat16: the kernel may round the softmax's weights and dS as well,
# 2**-9 of each term, and terms add up to a few units.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
}


def leaves_of(case: Case) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in case.inputs()]
