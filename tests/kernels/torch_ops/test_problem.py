"""How a call is cut into passes: every row once, dense as one block, gated blocks alone gated."""

import pytest
import torch

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.torch_ops.problem import Budget, Problem, QueryPass


def problem(queries: int = 300, length: int = 300, **arguments: object) -> Problem:
    given = MobaArguments(**{"block": 16, "topk": 3, **arguments})
    query = torch.randn(2, 4, queries, 8)
    key, value = torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 6)
    return Problem(query, key, value, given)


@pytest.mark.parametrize("partials", [1, 5_000, 200_000, 64 << 20])
def test_the_passes_cover_each_head_and_query_once(partials) -> None:
    made = problem()
    made.budget = Budget(partials, 4 << 20)
    seen = torch.zeros(2, 2, 300, dtype=torch.int64)
    for rows, heads in made.head_passes():
        for queries in made.query_passes():
            seen[rows, heads, queries] += 1
    assert bool((seen == 1).all())


def test_up_to_topk_blocks_a_call_is_dense_in_one_block() -> None:
    dense, sparse = problem(length=48, queries=48), problem(length=49, queries=49)
    assert (dense.block, dense.topk, dense.sinks) == (48, 1, 0)
    assert (sparse.block, sparse.topk) == (16, 3)


def test_heads_are_grouped_by_the_key_head_that_they_read() -> None:
    made = problem()
    tensor = torch.arange(4.0)[None, :, None, None].expand(2, 4, 300, 8)
    grouped = made.by_kv_head(tensor)
    assert grouped.shape == (2, 2, 300, 2, 8)
    assert grouped[0, :, 0, :, 0].tolist() == [[0, 1], [2, 3]]


def test_a_pass_knows_the_places_of_its_queries_at_the_end_of_the_keys() -> None:
    made = problem(queries=5, length=100)
    part = QueryPass(made, (slice(0, 2), slice(0, 1), slice(1, 4)))
    assert part.query.shape == (2, 1, 3, 2, 8)
    assert part.rank.tolist() == [[96, 97, 98]] * 2
    assert part.own.tolist() == part.last.tolist() == [[6, 6, 6]] * 2
    assert part.candidates.shape == (2, 6)  # no query chooses its own block


def test_of_packed_sequences_only_those_of_more_than_topk_blocks_are_gated() -> None:
    segments = torch.cat([torch.zeros(20), torch.ones(80)]).long().expand(2, 100)
    made = problem(queries=100, length=100, segments=segments)
    assert made.candidates.shape == (2, 5)
    assert made.blocks.count.gather(1, made.candidates).unique().tolist() == [80]
