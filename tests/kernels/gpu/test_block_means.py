"""Block means on a GPU, under Triton's interpreter, against the definition."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu.problem import Layout, layout
from tests.support.moba_cases import PACKINGS, PADDINGS, Case

CASES = [
    ("blocks of one key", Case(block=1, length=37, queries=37)),
    ("small blocks", Case(block=4, length=90, queries=90)),
    ("not a power of two", Case(block=12, length=90, queries=90)),
    ("larger than a tile", Case(block=80, length=500, queries=9)),
    ("head dim not a power of two", Case(dim=24)),
    ("bfloat16", Case(dtype=torch.bfloat16, block=16, length=90, queries=90)),
    *((f"layout: {x}", Case(layout=x)) for x in ("by token", "expanded", "strided")),
    *((f"padding: {p}", Case(padding=p, length=90, queries=90)) for p in PADDINGS[1:]),
    *((f"packing: {p}", Case(packing=p, length=90, queries=90)) for p in PACKINGS[1:]),
    ("packed and padded", Case(packing="runs", padding="holes", length=90, queries=90)),
]


def by_loop(source: Tensor, of: Layout) -> Tensor:
    """Of float [B, H, Nk, D]: each block's keys gathered and averaged."""
    out = torch.zeros(*source.shape[:2], of.n, source.shape[3])
    for row in range(len(source)):
        for number in range(of.n):
            first, size = int(of.blocks.start[row, number]), int(of.blocks.size[row, number])
            keys = torch.arange(first, first + size)
            if of.blocks.token is not None:
                keys = of.blocks.token[row].long()[keys]
            if size > 0:
                out[row, :, number] = source[row, :, keys].float().mean(1)
    return out


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_means_are_of_each_blocks_real_keys(case: Case) -> None:
    query, key, _ = case.inputs()
    of = layout(query, key, case.arguments())
    got = gpu_means.block_means(key, of)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_loop(key, of), rtol=0, atol=1e-7)  # sums are exact


@pytest.mark.parametrize("bias", ["all", "by head", "by row", "by key", "alibi"])
@pytest.mark.parametrize("packing", ["none", "interleaved"])
def test_means_of_biases_are_of_each_blocks_real_keys(bias: str, packing: str) -> None:
    case = Case(bias=bias, packing=packing, padding="holes", length=90, queries=90, block=4)
    query, key, _ = case.inputs()
    of = layout(query, key, case.arguments())
    given = case.key_bias()
    assert given is not None
    got = gpu_means.bias_means(given, of, query.shape[1])
    expected = by_loop(given.expand(2, 4, -1)[..., None], of)[..., 0]
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=1e-7)  # sums are exact


def test_three_bfloat16_parts_add_up_to_every_float32() -> None:
    numbers = torch.randn(2, 3, 40, 24) * 10.0 ** torch.randint(-20, 20, (2, 3, 40, 24))
    numbers[0, 0, 0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    got = gpu_means.parts(numbers)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.double().sum(0), numbers.double())


def test_means_repeat_bit_for_bit() -> None:
    case = Case(block=80, length=500, queries=9)
    query, key, _ = case.inputs()
    key = torch.randn_like(key)
    of = layout(query, key, case.arguments())
    first, again = gpu_means.block_means(key, of), gpu_means.block_means(key, of)
    assert torch.equal(first, again)
