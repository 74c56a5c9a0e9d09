"""A static cache is named in the reason: its step of decoding, and its prefill."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import Model, causal, inputs, outcome, run

LENGTH = 64
STATIC = "the keys lie in a static cache ('past'), and which of them are written is not known"


def cached(self: Model, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """As litgpt and gpt-fast write it: rows of a triangle by the places of the queries."""
    self.past.index_copy_(2, places, k)
    keep = self.triangle.index_select(0, places) if self.by_table else places[:, None] >= self.all
    return F.scaled_dot_product_attention(q, self.past, self.past, keep)


def model(by_table: bool) -> Model:
    made = Model(
        cached,
        past=torch.zeros(2, 4, LENGTH, 8),
        triangle=causal(LENGTH),
        all=torch.arange(LENGTH),
    )
    made.by_table = by_table
    return made


@pytest.mark.parametrize("by_table", [False, True])
def test_a_step_over_a_static_cache_is_no_cross_attention(by_table: bool) -> None:
    q, k, v = (x[:, :, :1] for x in inputs())
    made = model(by_table)
    expected = made(q, k, v, torch.tensor([5]))
    out, report = run(made, q, k, v, torch.tensor([5]))
    assert outcome(report)[0].startswith(STATIC), outcome(report)
    torch.testing.assert_close(out, expected)


def test_one_query_over_keys_that_nothing_is_written_to_is_no_cache() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        keep = (torch.arange(k.shape[2]) < length[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, keep)

    q, k, v = inputs()
    _, report = run(Model(body), q[:, :, :1], k, v, torch.tensor([5, 9]))
    assert "cross-attention or pooling" in outcome(report)[0]
