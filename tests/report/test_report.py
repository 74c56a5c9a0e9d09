"""The report: one row per attention site, and what the policy saves, as text, dict and JSON."""

import json
from dataclasses import asdict

import pytest
from torch import fx

from moonfx.report.attention import row_of
from moonfx.report.report import Report
from moonfx.site import Declined
from tests.support.attention_sites import SPARSE, changed, site, sparse_site

DECLINED = changed(
    layer="layers.1.attn",
    mask="",
    action="declined",
    block=None,
    topk=None,
    sinks=None,
    reason="dropout p=0.1 is active; set it to 0 or call eval() (node softmax)",
)
KEPT = changed(
    layer="layers.2.attn",
    action="kept dense",
    block=None,
    topk=None,
    sinks=None,
    reason="one of the last 1 (dense_last)",
)


def keys_seen(length: int, block: int, topk: int) -> int:
    """Key tokens that all queries attend, by counting them."""
    seen = 0
    for position in range(length):
        own = position // block
        earlier = own * block if own < topk else (topk - 1) * block
        seen += earlier + position % block + 1
    return seen


def test_rows_keep_their_order_and_are_counted_by_action() -> None:
    report = Report([SPARSE, DECLINED, KEPT], graphs=1)
    assert report.sites == [SPARSE, DECLINED, KEPT]
    assert report.rewritten == [SPARSE]
    assert report.declined == [DECLINED]
    first = report.footer().splitlines()[0]
    assert first == "3 attention sites in 1 graph(s): 1 sparse, 1 declined, 1 kept dense"


def test_text_has_one_line_per_site_with_policy_or_reason() -> None:
    lines = str(Report([SPARSE, KEPT], graphs=1)).splitlines()
    assert lines[0].split()[:4] == ["layer", "line", "form", "mask"]
    assert lines[2].split() == [
        *("layers.0.attn", "model.py:12", "sdpa", "causal", "8/2", "64", "sparse", "128/3/1"),
    ]
    assert "kept dense" in lines[3]
    assert "one of the last 1 (dense_last)" in lines[3]


def test_modifiers_have_a_column_where_there_are_any() -> None:
    capped = changed(modifiers="softcap 50, ALiBi")
    lines = str(Report([SPARSE, capped], graphs=1)).splitlines()
    assert lines[0].split()[:5] == ["layer", "line", "form", "mask", "modifiers"]
    assert "softcap 50, ALiBi" in lines[3]
    assert "modifiers" not in str(Report([SPARSE], graphs=1))


def test_dict_and_json_carry_everything() -> None:
    failure = "not captured, runs as it was: CaptureError: no"
    report = Report([SPARSE, DECLINED], graphs=2, failures=[failure])
    given = report.to_dict()
    assert given["sites"] == [asdict(SPARSE), asdict(DECLINED)]
    assert (given["graphs"], given["rewritten"], given["declined"]) == (2, 1, 1)
    assert given["failures"] == [failure]
    assert json.loads(report.to_json()) == given
    assert report.footer().splitlines()[-1] == failure


@pytest.mark.parametrize("length", [512, 1000, 1024, 4096])
@pytest.mark.parametrize(("block", "topk"), [(128, 3), (64, 1), (100, 4)])
def test_the_footer_states_the_share_that_counting_gives(
    length: int, block: int, topk: int
) -> None:
    row = changed(block=block, topk=topk, sinks=0, queries=length, keys=length)
    report = Report([row, DECLINED], graphs=1)
    dense, sparse = length * (length + 1) // 2, keys_seen(length, block, topk)
    saved = report.savings()
    assert saved["keys"] == length
    assert saved["dense"] is False
    assert saved["attended_share"] == pytest.approx(sparse / dense)
    assert saved["ideal_speedup"] == pytest.approx(dense / sparse)
    assert report.footer().splitlines()[1] == (
        f"at N = {length}: {sparse / dense:.1%} of key tokens attended, "
        f"FLOP-ideal speedup of these attentions {dense / sparse:.2f}x"
    )


@pytest.mark.parametrize("length", [1, 383, 384])
def test_the_footer_says_when_the_policy_is_dense_at_this_length(length: int) -> None:
    report = Report([changed(queries=length, keys=length)], graphs=1)
    line = f"dense: N <= block*topk at the traced length N = {length}"
    assert report.footer().splitlines()[1] == line


def test_nothing_is_promised_where_nothing_is_sparse() -> None:
    report = Report([DECLINED, KEPT], graphs=1)
    assert report.savings()["attended_share"] is None
    assert len(report.footer().splitlines()) == 1
    assert str(Report()).startswith("0 attention sites in 0 graph(s)")


def test_one_site_compiled_again_is_one_row_with_the_longest_length() -> None:
    report = Report()
    for keys in (100, 700, 300):
        report.add(map(row_of, [sparse_site("a", keys), sparse_site("b", keys)]))
    assert [(r.layer, r.keys) for r in report.rows] == [("a", 700), ("b", 700)]
    assert report.graphs == 3


def test_one_site_with_another_outcome_is_another_row() -> None:
    report = Report()
    node = fx.Graph().placeholder("q")
    report.add([row_of(sparse_site("a"))])
    report.add([row_of(site("a", reject=Declined("dropout", node)))])
    assert [(r.layer, r.action) for r in report.rows] == [("a", "sparse"), ("a", "declined")]


def test_kinds_of_calls_are_named_once_there_is_more_than_whole_ones() -> None:
    report = Report()
    report.add([row_of(sparse_site("a"))])
    assert "calls" not in str(report)
    for queries, keys in ((1, 1025), (7, 1032), (1, 1033)):
        made = sparse_site("a", keys)
        made.query_length = queries
        report.add([row_of(made)])
    (row,) = report.rows
    assert (row.calls, row.keys) == ("whole, step, chunk", 1033)
    assert "whole, step, chunk" in str(report)


def test_two_attentions_of_one_layer_are_two_rows() -> None:
    report = Report()
    for _ in range(2):
        report.add([row_of(sparse_site("a")), row_of(sparse_site("a"))])
    assert len(report.rows) == 2


def test_a_single_query_row_counts_the_keys_of_one_query() -> None:
    """Decode: one query over 1,024 keys attends its own block and two others."""
    report = Report([changed(queries=1)], graphs=1)
    assert report.savings()["attended_share"] == pytest.approx(3 * 128 / 1024)
