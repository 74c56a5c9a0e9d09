"""Packed batches given as a mask [B, N, N]: sequences by its values, which change by call."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from moonfx.passes.symbolic.input_masks import Given, Packed, given_by, packed_values_of
from tests.passes.attention.forms import Model, inputs

N, BLOCK, TOPK = 24, 4, 2
HIDDEN = torch.finfo(torch.float32).min


def packed(*lengths: tuple[int, ...]) -> Tensor:
    """bool [B, N, N], block-diagonal and causal, as torchtune makes it of each row's lengths."""
    rows = ([torch.ones(n, n, dtype=torch.bool).tril() for n in row] for row in lengths)
    return torch.stack([torch.block_diag(*blocks) for blocks in rows])


TWO_ROWS = packed((9, 15), (24,))
CAUSAL = packed((24,), (24,))
LOOSE, AHEAD, WIDE = packed((9, 15)), packed((9, 15)), packed((9, 15))
LOOSE[0, 20, 12] = False
AHEAD[0, 20, 21] = True
WIDE[0, 20, 3] = True
LAST_UNSEEN = packed((9, 15))
LAST_UNSEEN[0, -1] = False

READ = [
    # name, mask, what its values are
    ("two rows", TWO_ROWS, Packed(True, False)),
    ("one sequence a row", CAUSAL, Packed(True, False)),
    ("one key each", torch.eye(N, dtype=torch.bool)[None], Packed(True, False)),
    ("inverted", ~TWO_ROWS, Packed(False, True)),
    ("added", torch.where(TWO_ROWS, 0.0, HIDDEN)[:, None], Packed(0.0, HIDDEN)),
    ("causal, for all rows", CAUSAL[0], Given(True, False)),
    ("causal, for each head", CAUSAL[:, None], Given(True, False)),
    ("a key less", LOOSE, None),
    ("a later key", AHEAD, None),
    ("a key of another sequence", WIDE, None),
    ("a query that sees nothing", LAST_UNSEEN, None),
    ("blocks both ways", TWO_ROWS | TWO_ROWS.mT, None),
    ("a chunk", TWO_ROWS[:, 5:], None),
]


@pytest.mark.parametrize(("mask", "expected"), [r[1:] for r in READ], ids=[r[0] for r in READ])
def test_a_packed_mask_is_read_from_its_values(mask: Tensor, expected: Given | None) -> None:
    assert given_by(mask) == expected
    assert (packed_values_of(mask) is not None) == (expected is not None)


def model() -> Model:
    return Model(lambda self, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask[:, None]))


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    """Each sequence by itself."""
    rows = []
    for row, own in enumerate(lengths):
        parts = zip(*(x[row : row + 1].split(own, dim=2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([moonfx.moba_attention(*p, BLOCK, TOPK) for p in parts], 2))
    return torch.cat(rows)


def test_each_call_may_pack_other_sequences() -> None:
    q, k, v = inputs()
    made = moonfx.sparsify(model(), BLOCK, TOPK, sinks=0, compiler="eager", on_miss="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for lengths in (((9, 15), (24,)), ((24,), (24,)), ((1, 2, 21), (12, 12))):
            out = made(q, k, v, packed(*lengths))
            torch.testing.assert_close(out, alone(q, k, v, lengths), atol=2e-6, rtol=1e-5)
    assert [r.mask for r in moonfx.report(made).rows] == ["causal & packed"]


def test_a_batch_of_whole_rows_first_keeps_no_later_one_from_being_packed() -> None:
    q, k, v = inputs()
    made = moonfx.sparsify(model(), BLOCK, TOPK, sinks=0, compiler="eager", on_miss="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        made(q, k, v, CAUSAL)
        out = made(q, k, v, TWO_ROWS)
    expected = alone(q, k, v, ((9, 15), (24,)))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", [LOOSE, AHEAD, WIDE], ids=["less", "later", "of another"])
def test_another_mask_at_a_later_call_runs_as_it_was_written(mask: Tensor) -> None:
    q, k, v = inputs(b=1)
    made = moonfx.sparsify(model(), BLOCK, TOPK, sinks=0, compiler="eager", on_miss="raise")
    made(q, k, v, packed((9, 15)))
    with pytest.warns(RuntimeWarning, match="not the causal one"):
        out = made(q, k, v, mask.clone())
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask[:, None]))


def test_gradients_of_a_packed_batch_at_full_topk_are_dense_ones() -> None:
    results = []
    for make in (lambda m: m, lambda m: moonfx.sparsify(m, N, 1, sinks=0, compiler="eager")):
        leaves = [x.requires_grad_() for x in inputs()]
        make(model())(*leaves, TWO_ROWS).square().sum().backward()
        results.append([x.grad for x in leaves])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
