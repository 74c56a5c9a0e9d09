"""Counts of routes, tiles and bytes against the same counted one query at a time."""

from dataclasses import replace

import pytest

from moonfx.bench.attention.cases import PASSES, Case
from moonfx.bench.attention.counts import (
    blocks,
    compulsory_bytes,
    computed_pairs,
    needed_bytes,
    routes,
    scored,
    tile_fill,
)

CASE = Case(2, 6, 2, 100, 100, 8, "float32", 8, 4, 1, PASSES[0])
CASES = [
    CASE,
    replace(CASE, queries=7),
    replace(CASE, queries=1),
    replace(CASE, sinks=0),
    replace(CASE, topk=1, sinks=0),
    replace(CASE, sinks=3),
    replace(CASE, queries=30, length=30),  # dense
]


def own_blocks(case: Case) -> list[int]:
    """The block of each query."""
    return [p // case.block for p in range(case.length - case.queries, case.length)]


@pytest.mark.parametrize("case", CASES)
def test_each_query_has_as_many_routes_as_it_attends_blocks(case: Case) -> None:
    dense = case.length <= case.block * case.topk
    each = [1 if dense else min(own + 1, case.topk) for own in own_blocks(case)]
    assert routes(case) == pytest.approx(sum(each) * case.batch * case.heads)
    assert scored(case) == (0 if dense else sum(own_blocks(case)) * case.batch * case.heads)


@pytest.mark.parametrize("case", CASES)
def test_each_row_has_one_own_block_and_no_chance_is_more_than_one(case: Case) -> None:
    counted = blocks(case)
    assert float(counted.own.sum()) == case.queries * 3
    assert bool((counted.rows >= counted.own - 1e-9).all())
    assert bool(((counted.used >= 0) & (counted.used <= 1)).all())
    if case.sinks and case.length > case.block * case.topk:
        assert float(counted.rows[0]) == case.queries * 3  # all attend the sink


def test_tiles_of_one_row_are_full_and_larger_ones_compute_more() -> None:
    assert tile_fill(CASE, 1) == pytest.approx(1.0, abs=0.01)  # expectations are no whole rows
    assert 0 < tile_fill(CASE, 128) < tile_fill(CASE, 16) <= 1
    assert computed_pairs(CASE, 128, 8) > computed_pairs(CASE, 3, 1)


def test_bytes_grow_with_the_backward_the_dtype_and_what_is_attended() -> None:
    backward, half = replace(CASE, work=PASSES[1]), replace(CASE, dtype="bfloat16")
    assert compulsory_bytes(half) < compulsory_bytes(CASE) < compulsory_bytes(backward)
    step = replace(CASE, queries=1)
    assert compulsory_bytes(replace(step, means=True)) < compulsory_bytes(step)
    assert needed_bytes(CASE, expanded=True) > needed_bytes(CASE, expanded=False)
