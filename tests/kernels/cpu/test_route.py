"""Which blocks a query selects: alone as among others, and where scores are equal."""

import pytest
import torch

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from tests.support.cpu_kernel import chosen, needs_kernel
from tests.support.moba_cases import Case


@needs_kernel
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_query_alone_selects_the_blocks_that_it_selects_among_others(queries: int) -> None:
    """Blocks whose scores differ in the last bit only: any other order of a sum would show."""
    query = torch.randn(1, 4, 400, 33)
    key = torch.randn(1, 2, 1, 33) + 1e-6 * torch.randn(1, 2, 400, 33)
    full = chosen(query, key, 8, 9, 1)
    assert full[..., -1, :].sum(-1).eq(9).all()
    for length in (400, 397, 333):
        part = chosen(query[:, :, length - queries : length], key[:, :, :length], 8, 9, 1)
        assert torch.equal(part, full[:, :, length - queries : length, : part.shape[-1]])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_with_means_given_a_few_queries_read_the_blocks_that_they_select_alone(
    queries: int, dtype: torch.dtype
) -> None:
    case = Case(queries=queries, length=400, topk=3, sinks=1, means="other", dtype=dtype)
    query, key, value = case.inputs()
    means = case.block_means()
    expected = cpu.forward(query, key, value, case.arguments())
    found = reference.select_blocks(query, key, MobaArguments(8, 3, sinks=1, block_means=means))
    read = found.view(2, 2, 2, queries, -1).any(3).any(2).repeat_interleave(8, -1)[..., None]
    assert 0 < read.float().mean() < 0.3
    key, value = (x.masked_fill(~read, torch.nan) for x in (key, value))
    got = cpu.forward(query, key, value, case.arguments())
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("queries", [1, 100], ids=["decode", "prefill"])
def test_ties_go_to_the_lower_block(queries: int) -> None:
    query, key = torch.ones(1, 2, queries, 8), torch.ones(1, 1, 100, 8)
    key[:, :, 40:48] = 2.0  # one block is better, the others are equal
    got = chosen(query, key, 8, 5, 1)
    assert got[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2, 5, 12]
    assert torch.equal(got, reference.select_blocks(query, key, MobaArguments(8, 5, sinks=1)))


@needs_kernel
def test_bidirectional_ties_go_to_the_lower_block_whatever_side_it_is_on() -> None:
    query, key = torch.ones(1, 2, 100, 8), torch.ones(1, 1, 100, 8)
    key[:, :, 72:80] = 2.0  # block 9 is better; the last block, of 4 keys, is as good as the others
    got = chosen(query, key, 8, 5, 1, causal=False)
    expected = [  # the sink, the best, the lowest others, and the own block
        (4, [0, 1, 2, 3, 9]),
        (12, [0, 1, 2, 3, 9]),
        (40, [0, 1, 2, 5, 9]),
        (76, [0, 1, 2, 3, 9]),
        (99, [0, 1, 2, 9, 12]),
    ]
    for token, blocks in expected:
        assert got[0, 0, token].nonzero().flatten().tolist() == blocks, token
    assert torch.equal(
        got, reference.select_blocks(query, key, MobaArguments(8, 5, sinks=1, causal=False))
    )
