"""One row per attention: what became of a site, and which rows are the same."""

import pytest
from torch import fx

from moonfx.policy import LayerPolicy
from moonfx.report.attention import heads_of, outcome, row_of
from moonfx.site import Declined, Mask
from tests.support.attention_sites import SPARSE, changed, site


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask": Mask("causal"), "action": "sparse"}, ("sparse", "causal", "", None)),
        (
            {"action": "by the policy"},
            ("kept dense", "", "by the policy", None),
        ),
    ],
    ids=["sparse", "kept dense"],
)
def test_a_row_says_what_became_of_a_site(fields: dict[str, object], expected: tuple) -> None:
    row = row_of(site("layers.0.attn", **fields))
    assert (row.action, row.mask, row.reason, row.policy) == expected


def test_a_declined_row_gives_reason_and_node_and_no_policy() -> None:
    node = fx.Graph().placeholder("bias")
    declined = site("", reject=Declined("additive bias", node), policy=LayerPolicy())
    row = row_of(declined)
    assert (row.layer, row.action, row.reason) == (
        "(root)",
        "declined",
        "additive bias (node bias)",
    )
    assert row.policy is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"), [(8, 8, "8"), (8, 2, "8/2"), (8, 1, "8/1"), (None, None, "")]
)
def test_heads_are_counted_apart_where_they_differ(
    heads: int | None, kv_heads: int | None, expected: str
) -> None:
    assert heads_of(changed(heads=heads, kv_heads=kv_heads)) == expected


def test_a_row_has_a_policy_only_where_it_is_sparse() -> None:
    assert SPARSE.policy == LayerPolicy(128, 3, 1)
    assert row_of(site("a", action="by the policy", policy=LayerPolicy())).policy is None
    assert row_of(site("a", action="sparse", policy=LayerPolicy(16, 2, 0))).policy == LayerPolicy(
        16, 2, 0
    )


def test_lengths_and_nodes_make_no_other_row_and_all_else_does() -> None:
    same = [changed(queries=1, keys=5), changed(reason=" (node a)"), changed(heads=None)]
    assert {outcome(row) for row in same} == {outcome(SPARSE)}
    first, again = (changed(reason=f"dropout (node {n})") for n in "ab")
    assert outcome(first) == outcome(again)
    others = ["layer", "line", "form", "mask", "modifiers", "action", "reason"]
    for name in others:
        assert outcome(changed(**{name: "other"})) != outcome(SPARSE), name
    assert outcome(changed(topk=4)) != outcome(SPARSE)
