"""One row per attention: what became of a site, and which rows are the same."""

import pytest
from torch import fx

from moonfx.policy import LayerPolicy
from moonfx.report.attention import row_of
from moonfx.site import Declined, Mask
from tests.support.attention_sites import site


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
