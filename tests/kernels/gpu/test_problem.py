"""What GPU kernels read in place of masks and segments, against a plain loop over each row."""

import pytest
import torch

from moonfx.kernels.gpu.problem import Layout, layout
from tests.support.moba_cases import PACKINGS, PADDINGS, Case
from tests.support.no_waits import NoWaits


def made(case: Case) -> Layout:
    query, key, _ = case.inputs()
    arguments = case.arguments()
    with NoWaits():
        return layout(query, key, arguments)


def keys_of(of: Layout, row: int, number: int) -> list[int]:
    """The keys of a block, in the order of its slots."""
    start, size = int(of.blocks.start[row, number]), int(of.blocks.size[row, number])
    token = of.blocks.token
    keys = range(start, start + size) if token is None else token[row, start : start + size]
    return [int(key) for key in keys]


def check(case: Case) -> None:
    of, offset = made(case), case.length - case.queries
    dense = case.length <= case.block * case.topk
    block = case.length if dense else case.block
    assert (of.block, of.topk) == (block, 1 if dense else case.topk)
    assert (of.sinks, of.group) == (0 if dense else case.sinks, case.group)
    tensors = [x for x in (*vars(of.queries).values(), *vars(of.blocks).values()) if x is not None]
    assert {x.dtype for x in tensors} == {torch.int32}
    assert {tuple(x.shape) for x in tensors} <= {
        (case.batch, size) for size in (case.queries, case.length, of.n)
    }

    mask, segments = case.key_mask(), case.segments()
    for row in range(case.batch):
        ids = [0] * case.length if segments is None else segments[row].tolist()
        real = [True] * case.length if mask is None else mask[row].tolist()
        runs = {id: [j for j in range(case.length) if real[j] and ids[j] == id] for id in ids}
        assert int((of.blocks.size[row] > 0).sum()) == sum(
            -(-len(x) // block) for x in runs.values()
        )

        order = list(range(case.queries))
        if of.queries.index is not None:
            assert sorted(of.queries.index[row].tolist()) == order
            order = of.queries.index[row].tolist()
        assert order == sorted(order, key=lambda query: (ids[offset + query], query))
        for place, query in enumerate(order):
            token = offset + query
            run = runs[ids[token]]
            visible = [j for j in run if j <= token] if case.causal else run
            last, own, first, end = (
                int(getattr(of.queries, x)[row, place]) for x in ("last", "own", "first", "end")
            )
            if not visible:
                assert (last, own) == (-1, -1)
                assert end <= first
                continue
            parts = [run[j : j + block] for j in range(0, len(run), block)]
            assert [keys_of(of, row, first + j) for j in range(len(parts))] == parts
            mine = max(sum(j <= token for j in run) - 1, 0) // block
            assert (own, end) == (first + mine, first + (mine if case.causal else len(parts)))
            assert last == int(of.blocks.start[row, first]) + len(visible) - 1


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_layout_is_that_of_each_sequence_alone(packing: str, padding: str, causal: bool) -> None:
    check(Case(batch=3, length=30, queries=30, block=4, topk=3, sinks=1).but(
        packing=packing, padding=padding, causal=causal
    ))  # fmt: skip


SIZES = [
    ("blocks of one", Case(length=30, queries=30, block=1, topk=3)),
    ("a length of whole blocks", Case(length=32, queries=32, block=8)),
    ("dense", Case(length=30, queries=30, block=10, topk=3, sinks=2)),
    ("one more than dense", Case(length=31, queries=31, block=10, topk=3, sinks=2)),
    ("one token", Case(length=1, queries=1)),
    ("one query", Case(length=30, queries=1, block=4)),
    ("fewer queries", Case(length=30, queries=11, block=4)),
    ("a group of three", Case(length=30, queries=30, block=4, group=3)),
]


@pytest.mark.parametrize(("name", "case"), SIZES, ids=[name for name, _ in SIZES])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("packing", ["none", "runs", "interleaved", "one token each"])
def test_a_layout_holds_for_every_size(name: str, case: Case, packing: str, padding: str) -> None:
    check(case.but(packing=packing, padding=padding))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 0, 0)])
@pytest.mark.parametrize("packing", ["none", "runs"])
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_nothing_has_a_layout_too(shape: tuple[int, int, int], packing: str, padding: str) -> None:
    batch, queries, length = shape
    of = made(Case(batch=batch, queries=queries, length=length, packing=packing, padding=padding))
    assert of.queries.last.shape == (batch, queries)
    assert of.blocks.size.shape == (batch, of.n)


def test_rows_without_padding_or_packing_share_one_layout() -> None:
    of = made(Case(batch=3))
    assert of.queries.index is None
    assert of.blocks.token is None
    queries, blocks = of.queries, of.blocks
    shared = queries.last, queries.own, queries.first, queries.end, blocks.start, blocks.size
    assert {x.stride(0) for x in shared} == {0}


def shapes(of: Layout) -> list[torch.Size | None]:
    tensors = (*vars(of.queries).values(), *vars(of.blocks).values())
    return [None if x is None else x.shape for x in tensors]


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("packing", ["none", "runs"])
@pytest.mark.parametrize("causal", [True, False])
def test_sizes_follow_from_shapes_alone(packing: str, padding: str, causal: bool) -> None:
    case = Case(packing=packing, padding=padding, causal=causal, topk=3)
    query, key, _ = case.inputs()
    arguments = case.arguments()
    given = {"key_mask": arguments.key_mask, "segments": arguments.segments}
    unread = {name: None if x is None else x.to("meta") for name, x in given.items()}
    of = layout(query.to("meta"), key.to("meta"), arguments._replace(**unread))
    assert shapes(of) == shapes(layout(query, key, arguments))
