"""Packed sequences: proved from position_ids or segment ids, and computed as if each were alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from tests.passes.attention.forms import D, H, Model, causal, inputs, outcome, run
from tests.support.zoo import build, oracle

pytest.importorskip("transformers")

N, BLOCK, TOPK, SINKS = 40, 4, 3, 1
LENGTHS = (17, 9, 14)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
PARTS = [slice(0, 17), slice(17, 26), slice(26, 40)]
SEGMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]

Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ids(batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 100, (batch, N), generator=generator)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_a_packed_llama_gives_what_each_sequence_gives_alone(form: str) -> None:
    model = moonfx.sparsify(build("llama", form), BLOCK, TOPK, sinks=SINKS, compiler="eager")
    got = model(ids(), position_ids=POSITIONS, use_cache=False).logits
    assert outcome(moonfx.report(model)) == ["causal & packed"] * 2
    for part in PARTS:
        alone, _ = oracle("llama", ids()[:, part].contiguous(), None, BLOCK, TOPK, SINKS)
        torch.testing.assert_close(got[:, part], alone, atol=5e-6, rtol=1e-4)


def test_a_packed_llama_trains_as_it_does_dense_at_full_topk() -> None:
    model = build("llama", "sdpa")
    results = []
    for make in (lambda m: m, lambda m: moonfx.sparsify(m, 8, 5, compiler="eager")):
        model.zero_grad()
        out = make(model)(ids(2), position_ids=POSITIONS.expand(2, -1), use_cache=False).logits
        out.square().mean().backward()
        results.append((out.detach(), [p.grad for p in model.parameters()]))
    assert outcome(moonfx.report(model)) == ["causal & packed"] * 2
    (dense, dense_grads), (full, grads) = results
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-4)
    for grad, expected in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(grad, expected, atol=5e-6, rtol=1e-3)


def packed_by(keep: Keep) -> Model:
    """Attention whose mask is keep(i, j, ids of the queries, ids of the keys)."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
        i, j = torch.arange(N)[:, None], torch.arange(N)[None]
        mask = keep(i, j, segments[:, :, None], segments[:, None, :])
        return F.scaled_dot_product_attention(q, k, v, mask[:, None])

    return Model(body)


SPELLINGS: list[tuple[str, Keep, str]] = [
    ("equal", lambda i, j, a, b: (j <= i) & (a == b), "causal & packed"),
    ("turned", lambda i, j, a, b: (b == a) & (i >= j), "causal & packed"),
    ("not unequal", lambda i, j, a, b: ~((a != b) | (j > i)), "causal & packed"),
    ("difference", lambda i, j, a, b: (j <= i) & ((a - b) == 0), "causal & packed"),
    ("shifted alike", lambda i, j, a, b: (j <= i) & (a + 1 == b + 1), "causal & packed"),
    ("added", lambda i, j, a, b: _float(j <= i) + _float(a == b), "causal & packed"),
    (
        "0 is padding",
        lambda i, j, a, b: (j <= i) & (a == b) & (b != 0),
        "causal & padding & packed",
    ),
    (
        "0 is padding, said of the query",
        lambda i, j, a, b: (j <= i) & (a == b) & (a > 0),
        "causal & padding & packed",
    ),
]


def _float(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, -torch.inf)


@pytest.mark.parametrize("keep", [s[1:] for s in SPELLINGS], ids=[s[0] for s in SPELLINGS])
def test_segment_ids_in_any_spelling_are_packed_sequences(keep: tuple[Keep, str]) -> None:
    q, k, v = inputs(1, H, N, D)
    padded = "padding" in keep[1]
    out, report = run(packed_by(keep[0]), q, k, v, SEGMENTS, block=BLOCK, topk=TOPK)
    assert outcome(report) == [keep[1]]
    for part in PARTS[1:] if padded else PARTS:
        alone = moonfx.moba_attention(q[:, :, part], k[:, :, part], v[:, :, part], BLOCK, TOPK)
        torch.testing.assert_close(out[:, :, part], alone, atol=2e-6, rtol=1e-5)


# Which document a token is in, from the tokens that end one; the first three keep it in its own.
ENDS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("counted before it", lambda end: end.cumsum(-1) - end.int()),
    ("counted before it, of integers", lambda end: end.int().cumsum(-1) - end.int()),
    ("joined", lambda end: F.pad(end.cumsum(-1)[:, :-1], (1, 0))),
    ("apart from it", lambda end: 2 * end.cumsum(-1) - end.long()),
]


@pytest.mark.parametrize("make", [e[1] for e in ENDS], ids=[e[0] for e in ENDS])
def test_documents_are_told_apart_by_the_tokens_that_end_them(make) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        ids = make(tokens == 0)
        keep = causal(N) & (ids[:, :, None] == ids[:, None])
        return F.scaled_dot_product_attention(q, k, v, keep[:, None])

    q, k, v = inputs(1, H, N, D)
    tokens = torch.ones(1, N, dtype=torch.long)
    tokens[0, [16, 25]] = 0
    parts = PARTS
    if make is ENDS[3][1]:  # the last token of a document is one of its own
        parts = [slice(0, 16), slice(16, 17), slice(17, 25), slice(25, 26), slice(26, 40)]
    out, report = run(Model(body), q, k, v, tokens, block=BLOCK, topk=TOPK)
    assert outcome(report) == ["causal & packed"]
    for part in parts:
        alone = moonfx.moba_attention(q[:, :, part], k[:, :, part], v[:, :, part], BLOCK, TOPK)
        torch.testing.assert_close(out[:, :, part], alone, atol=2e-6, rtol=1e-5)


LOOKALIKES: list[tuple[str, Keep, str]] = [
    ("at most", lambda i, j, a, b: (j <= i) & (b <= a), "packed sequences: queries and keys"),
    ("unequal", lambda i, j, a, b: (j <= i) & (a != b), "packed sequences: queries and keys"),
    ("one more", lambda i, j, a, b: (j <= i) & (a == b + 1), "packed sequences: queries and"),
    ("the next key", lambda i, j, a, b: (j <= i) & (a == b.roll(1, 2)), "packed sequences"),
    ("or", lambda i, j, a, b: (j <= i) | (a == b), "a choice between masks: causal, or"),
    ("two ids", lambda i, j, a, b: (j <= i) & (a == b) & (a // 2 == b // 2), "packed sequences"),
    ("one id", lambda i, j, a, b: (j <= i) & (b == 1), "causal & padding"),
    ("whole queries", lambda i, j, a, b: (j <= i) & (a == 1).expand(1, N, N), "whole queries"),
    ("not causal", lambda i, j, a, b: a == b, "bidirectional: the mask is not causal"),
]


@pytest.mark.parametrize("keep", [s[1:] for s in LOOKALIKES], ids=[s[0] for s in LOOKALIKES])
def test_what_only_looks_packed_is_declined_by_name(keep: tuple[Keep, str]) -> None:
    given = (*inputs(1, H, N, D), SEGMENTS)
    model = packed_by(keep[0])
    expected = model(*given)
    out, report = run(model, *given)
    assert outcome(report)[0].startswith(keep[1]), outcome(report)
    if report.declined:
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def positions_and_detector(step: int, strict: bool) -> Model:
    """What Hugging Face writes for packed position_ids, with the step of its detector."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        change = torch.diff(at, prepend=at[:, :1] - step, dim=-1) != step
        segment = change.cumsum(-1)
        before = at[:, None, :] < at[:, :, None] if strict else at[:, None, :] <= at[:, :, None]
        same = segment[:, None, :] == segment[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, (same & before)[:, None])

    return Model(body)


@pytest.mark.parametrize(
    ("step", "strict", "expected"),
    [(1, False, "causal & packed"), (1, True, "causal with offset -1"), (2, False, "packed seq")],
)
def test_positions_are_places_only_where_they_go_up_one_by_one(
    step: int, strict: bool, expected: str
) -> None:
    _, report = run(positions_and_detector(step, strict), *inputs(1, H, N, D), POSITIONS * step)
    assert outcome(report)[0].startswith(expected), outcome(report)


def test_ids_of_two_kinds_at_once_are_declined() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        keep = causal(N) & (a[:, :, None] == a[:, None]) & (b[:, :, None] == b[:, None])
        return F.scaled_dot_product_attention(q, k, v, keep[:, None])

    _, report = run(Model(body), *inputs(1, H, N, D), SEGMENTS, SEGMENTS // 2)
    assert outcome(report) == ["packed sequences, told apart by 2 tensors at once"]


def test_narrow_positions_that_start_again_at_0_are_no_sequence() -> None:
    """255 and 0 of uint8 differ by one, and 255 <= 0 does not hold."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
        ids = (place.diff(prepend=place[:, :1]) != 1).cumsum(-1)
        mask = (place[:, None] <= place[:, :, None]) & (ids[:, None] == ids[:, :, None])
        return F.scaled_dot_product_attention(q, k, v, mask[:, None])

    given = (*inputs(1, H, N, D), (torch.arange(N) + 240).to(torch.uint8)[None])
    dense = body(Model(body), *given)
    out, report = run(Model(body), *given)
    assert outcome(report)[0].startswith("packed sequences: queries and keys are compared")
    assert torch.equal(out, dense)
