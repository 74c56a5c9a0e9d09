"""Masks that look causal and are not, or not provably: declined, left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from tests.passes.attention.forms import NEG, B, Model, N, causal, inputs, outcome, run
from tests.passes.attention.lookalikes import (
    Body,
    Row,
    check_lookalike,
    scores,
)


def bidirectional(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def bidirectional_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def masked_by(make: Callable[[Model, Tensor, Tensor], Tensor], n: int = N) -> Body:
    """SDPA with a bool mask made of index rows i [n, 1] and columns j [1, N]."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(N)[None]
        return F.scaled_dot_product_attention(q[:, :, :n], k, v, make(self, i, j))

    return body


def changed_in_place(change: Callable[[Tensor], Any]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
        change(mask)
        return F.scaled_dot_product_attention(q, k, v, mask)

    return body


def changed_through_unbind(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
    mask.unbind(0)[3].fill_(True)
    return F.scaled_dot_product_attention(q, k, v, mask)


def built_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((N, N), -torch.inf).tril_(diagonal=-1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def read_then_changed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out + F.scaled_dot_product_attention(q, k, v, mask.triu_())


def chunks_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    segment = torch.arange(N) // 5
    keep = causal() & (segment[:, None] == segment[None])
    return F.scaled_dot_product_attention(q, k, v, keep)


IN_PLACE = "the mask is written to in place"

LOOKALIKES: list[Row] = [
    ("bidirectional", bidirectional, "bidirectional: no mask and not causal"),
    ("bidirectional, sdpa", bidirectional_sdpa, "bidirectional: no mask and not causal"),
    ("strictly causal", masked_by(lambda m, i, j: j < i), "causal with offset -1"),
    ("one ahead", masked_by(lambda m, i, j: j <= i + 1), "causal with offset 1"),
    ("anti-causal", masked_by(lambda m, i, j: j >= i), "anti-causal"),
    ("triu of the wrong side", masked_by(lambda m, i, j: (i >= 0).expand(N, N).triu()), "anti-"),
    ("sliding", masked_by(lambda m, i, j: (j <= i) & (i - j < 5)), "sliding window of 5 tokens"),
    ("prefix", masked_by(lambda m, i, j: (j <= i) | (j < 6)), "prefix-LM: the keys of"),
    ("doubled", masked_by(lambda m, i, j: 2 * j <= i), "unsupported mask condition"),
    ("tokens shifted", masked_by(lambda m, i, j: (j <= i) & (j < 9)), "unsupported mask condition"),
    ("top-left, Nq < Nk", masked_by(lambda m, i, j: j <= i, 9), "causal with offset 0"),
    ("wrong offset, Nq < Nk", masked_by(lambda m, i, j: j <= i + 3, 9), "causal with offset 3"),
    ("chunks", chunks_sdpa, "chunked attention of 5 tokens"),
    ("packed by >=", masked_by(lambda m, i, j: (j <= i) & (m.row_id[i] >= m.row_id[j])), "packed"),
    (
        "packed, shifted",
        masked_by(lambda m, i, j: (j <= i) & (m.row_id[i] == m.row_id.roll(1)[j])),
        "packed sequences: queries and keys are compared by",
    ),
    ("mask in a buffer", masked_by(lambda m, i, j: m.holed), "of the mask 'holed' are not known"),
    ("mask by head", masked_by(lambda m, i, j: m.by_head & (j <= i)), "differs by head"),
    ("not a triangle", masked_by(lambda m, i, j: m.holed), "the values of the mask"),
    (
        "NaN is not NaN",
        masked_by(lambda m, i, j: (m.row != m.row) | (j <= i)),
        "prefix-LM: the keys of a prefix (by 'ne')",
    ),
    (
        "half-precision positions",
        masked_by(lambda m, i, j: j.half() <= i.half()),
        "the values of the mask 'le' are not known",
    ),
    (
        "masked_fill_",
        changed_in_place(lambda m: m.masked_fill_(torch.eye(N).bool(), 0)),
        "the values of",
    ),
    ("mask[:, 0] = False", changed_in_place(lambda m: m[:, 0].fill_(False)), "unsupported mask"),
    ("mask[0] = True", changed_in_place(lambda m: m.__setitem__(0, True)), "a choice between"),
    ("logical_not_", changed_in_place(lambda m: m.logical_not_()), "anti-causal"),
    ("changed through unbind", changed_through_unbind, IN_PLACE),
    ("triu_ of the wrong side", built_in_place, "anti-causal"),
    ("read before triu_", read_then_changed, IN_PLACE),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason, attentions=1 + (body is read_then_changed))


def test_what_hides_earlier_keys_is_no_window_that_is_sparse_already() -> None:
    body = masked_by(lambda m, i, j: (i >= 0).expand(N, N).triu())
    _, report = run(Model(body), *inputs())
    (reason,) = outcome(report)
    assert reason.startswith("anti-causal")
    assert "already sparse" not in reason


GIVEN = {
    "4-D": causal().expand(B, 1, N, N),
    "4-D float": torch.where(causal(), 0.0, NEG).expand(B, 1, N, N),
    "2-D": causal(),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_mask_that_the_caller_gives_is_never_believed_unseen(kind: str) -> None:
    """Its values are compared at each call; with others, the attention runs as it was written."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    model, first = Model(body), GIVEN[kind]
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager", on_miss="ignore")
    model(*inputs(), first)
    other = first.clone()
    other[..., 9, 2] = other[..., 0, -1]  # one more key is hidden from one query
    out = model(*inputs(), other)
    torch.testing.assert_close(out, body(model, *inputs(), other), atol=2e-6, rtol=1e-5)


def test_causal_from_the_top_left_is_declined_unless_the_lengths_are_equal() -> None:
    q, k, v = inputs()
    _, report = run(
        Model(lambda self, *x: F.scaled_dot_product_attention(*x, is_causal=True)),
        q[:, :, :5],
        k,
        v,
    )
    assert outcome(report)[0].startswith("is_causal aligns the first query with the first key")


def test_cross_attention_is_declined() -> None:
    q, k, v = inputs()
    _, report = run(Model(lambda self, *x: F.scaled_dot_product_attention(*x)), q[:, :, :5], k, v)
    (reason,) = outcome(report)
    assert reason.startswith("bidirectional: no mask and not causal; causal_only=False makes self")
    _, report = run(Model(lambda self, *x: F.scaled_dot_product_attention(*x)), q[:, :, :1], k, v)
    assert "cross-attention or pooling" in outcome(report)[0]


def test_a_padding_mask_that_is_written_to_is_declined() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        mask = causal() & real[:, None, None, :]
        real.fill_(False)  # after the mask was made, before attention reads it
        return F.scaled_dot_product_attention(q, k, v, mask)

    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :7] = False
    expected = F.scaled_dot_product_attention(*inputs(), causal() & real[:, None, None, :])
    out, report = run(Model(body), *inputs(), real.clone())
    assert outcome(report)[0].startswith("the mask is written to in place")
    assert torch.equal(out, expected)


def test_a_triangle_in_a_buffer_that_changes_after_compilation_is_an_error() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~self.triangle, NEG).softmax(-1) @ v

    model = Model(body, triangle=causal())
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    model.triangle.copy_(causal())
    model(*inputs())  # the same values again
    model.triangle[3, 1] = False
    with pytest.raises(RuntimeError, match="proved to hold a causal mask has changed"):
        model(*inputs())
    moonfx.restore(model)
    expected = body(model, *inputs())
    assert torch.equal(model(*inputs()), expected)


def test_a_triangle_that_is_replaced_by_another_tensor_is_an_error() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~self.triangle, NEG).softmax(-1) @ v

    model = Model(body, triangle=causal())
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    model.triangle = torch.ones_like(causal())
    with pytest.raises(RuntimeError, match="proved to hold a causal mask has changed"):
        model(*inputs())


def test_a_buffer_that_no_rewrite_rests_on_may_change() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(y, k, v, self.bias)

    model = Model(body, bias=torch.zeros(N, N))
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    assert [r.action for r in moonfx.report(model).rows] == ["sparse", "declined"]
    model.bias[2, 3] = 1.0
    torch.testing.assert_close(model(*inputs()), body(model, *inputs()), atol=2e-6, rtol=1e-5)


def test_a_reason_names_a_buffer_as_the_model_does() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner(q, k, v)

    inner = Model(masked_by(lambda m, i, j: m.holed), holed=causal())
    inner.holed[3, 1] = False
    model = Model(body)
    model.inner = inner
    _, report = run(model, *inputs())
    assert outcome(report)[0].startswith("the values of the mask 'inner.holed' are not known")
