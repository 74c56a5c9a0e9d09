"""Which program of dK and dV sums which routes: each once, the longest lists first."""

import pytest

pytest.importorskip("triton")

from moonfx.kernels.gpu import backward_schedule as gpu_backward_plan
from tests.support.gpu_backward import problem
from tests.support.moba_cases import Case
from tests.support.no_waits import NoWaits

PLANS = [
    ("causal", Case(topk=3, sinks=1, length=90, queries=90)),
    ("fewer queries", Case(topk=3, length=90, queries=25)),
    ("holes", Case(topk=3, sinks=1, padding="holes", length=90, queries=90)),
    ("dense, padded", Case(topk=20, padding="left", length=90, queries=60)),
    ("packed", Case(packing="interleaved", padding="holes", topk=3, length=90, queries=90)),
    ("bidirectional", Case(causal=False, topk=3, length=90, queries=90)),
]


@pytest.mark.parametrize("case", [case for _, case in PLANS], ids=[name for name, _ in PLANS])
@pytest.mark.parametrize("split", [0, 1 << 10, 1 << 20])
def test_a_plan_has_each_row_and_key_that_see_each_other_once(
    case: Case, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_backward_plan, "SHORT", 16)
    monkeypatch.setattr(gpu_backward_plan, "SPLIT", split)
    case = case.but(kv_heads=1, block=16)
    _, _, _, _, _, of, index, _ = problem(case)
    with NoWaits():
        todo = gpu_backward_plan.plan(index, of, 1, 8, 64)
    rows = case.queries * case.group
    bounds = [b * rows for b in range(case.batch + 1)]
    if index is not None:
        bounds = index.starts[:: index.chunks].tolist()
    seen = []
    places = [int(row[5]) for row in todo.items if row[0] >= 0 and row[5] >= 0]
    assert len(places) == len(set(places))
    assert max(places, default=-1) < max(todo.places, 1)
    for block, offset, begin, whole, end, *_ in todo.items.tolist():
        if block < 0:
            continue
        b, number = divmod(block, of.n)
        start, size = int(of.blocks.start[b, number]), int(of.blocks.size[b, number])
        slots = range(start + offset, start + min(offset + 8, size))
        assert begin <= whole <= end <= bounds[block + 1]
        for at in range(begin, end):
            row = at - bounds[block] if index is None else int(index.entries[at]) // of.topk
            last = int(of.queries.last[b, row // of.group])
            assert at < whole or last >= slots[-1]
            seen += [(b, row, slot) for slot in slots if slot <= last]
    expected = []
    for block in range(case.batch * of.n):
        b, number = divmod(block, of.n)
        start, size = int(of.blocks.start[b, number]), int(of.blocks.size[b, number])
        for at in range(bounds[block], bounds[block + 1]):
            row = at - bounds[block] if index is None else int(index.entries[at]) // of.topk
            last = int(of.queries.last[b, row // of.group])
            expected += [(b, row, s) for s in range(start, start + size) if s <= last]
    assert sorted(seen) == sorted(expected)


def test_the_longest_lists_come_first_and_none_is_cut_where_they_are_short() -> None:
    *_, of, index, _ = problem(Case(kv_heads=1, topk=3, sinks=1, length=90, queries=90))
    todo = gpu_backward_plan.plan(index, of, 1, 16, 1 << 10)
    block, _, _, _, _, place, parts, _ = todo.items.T
    assert todo.places == 0
    assert place[block >= 0].eq(-1).all()
    assert parts.eq(0).all()
    routes = index.starts[:: index.chunks].diff()[block[block >= 0]]
    assert routes.tolist() == sorted(routes.tolist(), reverse=True)
    assert block[int((block >= 0).sum()) :].eq(-1).all()  # what is no item comes last


def test_one_part_of_a_list_that_is_cut_adds_up_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backward_plan, "SHORT", 16)
    monkeypatch.setattr(gpu_backward_plan, "SPLIT", 1 << 17)
    *_, of, index, _ = problem(Case(batch=1, kv_heads=1, topk=3, sinks=1, length=64, queries=64))
    todo = gpu_backward_plan.plan(index, of, 1, 16, 1 << 10)
    items = [row for row in todo.items.tolist() if row[0] >= 0]
    leads = [row for row in items if row[6]]
    assert leads
    for block, offset, _, _, _, place, parts, step in leads:
        of_tile = [r[5] for r in items if r[0] == block and r[1] == offset]
        assert sorted(of_tile) == [place + i * step for i in range(parts)]
