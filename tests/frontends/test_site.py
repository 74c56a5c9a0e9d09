"""What a pass found, in the words of the report."""

from typing import Any

import pytest
from torch import fx

from moonfx.site import Declined, Mask
from tests.support.attention_sites import site

NODE = fx.Graph().placeholder("softmax")


def test_a_reason_names_the_node_that_stands_in_the_way() -> None:
    reason = Declined("dropout is active", NODE)
    assert str(reason) == "dropout is active (node softmax)"
    assert (reason.reason, reason.node) == ("dropout is active", NODE)


@pytest.mark.parametrize(
    ("kind", "causal"),
    [("causal", True), ("causal & padding", True), ("all", False), ("all & packed", False)],
)
def test_a_mask_is_causal_by_its_kind(kind: str, causal: bool) -> None:
    assert Mask(kind).causal is causal


MODIFIERS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"softcap": 50.0}, "softcap 50"),
    ({"softcap": 0.5, "sink_logits": NODE}, "softcap 0.5, sink logits"),
    ({"lse": NODE}, "logsumexp"),
    ({"mask": Mask("causal", bias="ALiBi")}, "ALiBi"),
    ({"mask": Mask("causal & padding")}, ""),
    (
        {"softcap": 30.0, "sink_logits": NODE, "lse": NODE, "mask": Mask("all", bias="ALiBi")},
        "softcap 30, sink logits, logsumexp, ALiBi",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), MODIFIERS)
def test_what_acts_on_the_scores_beside_scale_and_mask_is_listed(
    fields: dict[str, Any], expected: str
) -> None:
    assert site("layer", **fields).modifiers == expected


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, False), ({"sink_logits": NODE}, True), ({"lse": NODE}, True)]
)
def test_a_constant_of_all_scores_is_seen_by_what_joins_the_sum(
    fields: dict[str, Any], expected: bool
) -> None:
    assert site("layer", **fields).sees_constants is expected


@pytest.mark.parametrize(
    ("folded", "heads", "expected"),
    [(True, 8, True), (True, 1, False), (True, None, False), (False, 8, False)],
)
def test_heads_in_the_batch_are_told_apart_where_there_are_several(
    folded: bool, heads: int | None, expected: bool
) -> None:
    assert site("layer", folded=folded, heads=heads).unfolds is expected
