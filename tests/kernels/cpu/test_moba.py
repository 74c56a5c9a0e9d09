"""The C++ kernel against the reference; its routing, its determinism, its memory, its build."""

import itertools
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, Case, cases, feature_cases

needs_kernel = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

# float32: sums of some hundred products, and an exponential good to 1e-7, of values up to 10.
# The others: one rounding of the result on each side, the weights' rounding, a delta taken from the
# rounded output: two units in the last place (2**-7, 2**-10), or of the largest term of a sum.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}
# ALiBi's lse goes to 90: its own rounding, 4e-6, changes all of a query's weights in backward.
ALIBI = {"rtol": 1e-5, "atol": 1e-4}
DTYPES = list(TOLERANCE)

TABLE = [
    ("one block exactly", Case(queries=8, length=8)),
    ("a length that no block divides", Case(queries=333, length=333, block=32, topk=3)),
    ("one query head per kv head", Case(group=1, queries=200, length=200, dim=64, value_dim=64)),
    ("eight query heads per kv head", Case(group=8, queries=100, length=100, dim=32, block=16)),
    ("fewer queries than keys", Case(queries=70, length=200, block=16, topk=3, sinks=1)),
    ("one query", Case(queries=1, length=200, block=16, topk=3, sinks=1)),
    ("a few queries", Case(queries=5, length=200, block=16, topk=3)),
    ("blocks of one key", Case(queries=90, length=90, block=1, topk=4, sinks=2)),
    ("only the own block", Case(queries=150, length=150, block=32, topk=1)),
    ("only the own block and sinks", Case(queries=150, length=150, block=16, topk=3, sinks=2)),
    ("blocks wider than a key tile", Case(batch=1, queries=800, length=800, block=320)),
    ("the dense regime", Case(batch=1, queries=700, length=700, block=512, dim=64)),
    ("the dense regime, one query", Case(queries=1, length=700, block=512, topk=2, dim=64)),
    ("value wider than key", Case(queries=80, length=80, dim=8, value_dim=136, block=16)),
    ("odd dims", Case(queries=80, length=80, dim=13, value_dim=7, block=16)),
    ("dims of one", Case(queries=80, length=80, dim=1, value_dim=1, block=16)),
    ("wide heads", Case(batch=1, queries=150, length=150, dim=256, value_dim=256, block=32)),
    ("a negative scale", Case(queries=80, length=80, scale=-0.5)),
    ("more blocks than a panel", Case(batch=1, queries=300, length=300, block=2, topk=70, sinks=3)),
    *((f"padding: {p}", Case(batch=3, queries=90, length=90, padding=p, topk=3, sinks=1))
      for p in ("left", "right", "holes", "one row empty")),
    *((f"one query, padding: {p}", Case(batch=3, queries=1, length=90, padding=p, topk=3))
      for p in ("left", "right", "holes", "one row empty")),
    *((f"layout: {x}", Case(queries=90, length=90, layout=x)) for x in ("by token", "expanded",
                                                                        "strided")),
]  # fmt: skip


ROWS = [
    *FEATURES,
    *GIVEN_MEANS,
    ("means given, more than a panel",
     Case(batch=1, means="other", queries=300, length=300, block=2, topk=9, sinks=3, dim=40)),
    ("means given, a few queries",
     Case(means="other", queries=3, length=300, block=2, topk=9, padding="holes")),
]  # fmt: skip

# Every pair of these is one problem; a later one's sizes win.
PARTS: dict[str, dict[str, Any]] = {
    "padding": {"padding": "holes", "length": 90, "queries": 90},
    "softcap": {"softcap": 0.5},
    "bias": {"bias": "all", "scale": 0.25},
    "packing": {"packing": "runs", "length": 90, "queries": 90},
    "value wider than key": {"dim": 8, "value_dim": 40},
    "three query heads per kv head": {"group": 3, "kv_heads": 1},
    "blocks wider than backward's tile": {"batch": 1, "kv_heads": 1, "length": 1100, "block": 512,
                                          "queries": 1100, "dim": 104, "topk": 2, "sinks": 0},
    "dense": {"topk": 200},
    "bidirectional": {"causal": False},
    "a few queries": {"queries": 3, "causal": True},
}  # fmt: skip
PAIRS = [
    (f"{one}, {other}", Case(topk=3, sinks=1).but(**PARTS[one] | PARTS[other]))
    for one, other in itertools.combinations(PARTS, 2)
    if (one, other) != ("bidirectional", "a few queries")  # it needs a query for each key
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test choose the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no memory of the library that this process has loaded."""
    monkeypatch.setenv("MOONFX_CACHE_DIR", str(tmp_path / "cache"))
    cpu_build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu_build.library.cache_clear()


def assert_like_reference(case: Case, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    tensors = inputs or case.inputs()
    uneven = case.padding != "none" or case.packing != "none" or case.length % case.block
    if not case.causal and uneven:
        # A candidate may then have any number of keys, and its mean be inexact: no ties, please.
        generator = torch.Generator().manual_seed(case.seed)
        drawn = (torch.rand(x.shape, generator=generator) for x in tensors)
        query, key, value = ((x * y).to(x) for x, y in zip(tensors, drawn, strict=True))
        tensors = query, key, value
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    named = case.named()
    if (bias := case.key_bias()) is not None:  # unbroadcast, as the kernel's gradient is
        bias = bias.expand(*leaves[0].shape[:2], case.length).double().requires_grad_()
        named["key_bias"] = bias
    variables = leaves if bias is None else [*leaves, bias]
    out, lse = reference.moba_attention(*leaves, MobaArguments(case.block, case.topk, **named))
    grad_out = torch.randint(-8, 9, out.shape) / 8
    grad_lse = torch.randint(-8, 9, lse.shape) / 8
    expected = torch.autograd.grad((out, lse), variables, (grad_out, grad_lse))
    got, got_lse = cpu.forward(*tensors, case.arguments())
    *grads, grad_bias = cpu.backward(
        grad_out.to(case.dtype), grad_lse, *tensors, got, got_lse, case.arguments()
    )
    assert (grad_bias is None) == (bias is None)
    if grad_bias is not None:
        grads.append(grad_bias)
    names = ("out", "lse", "dq", "dk", "dv", "db")[: 2 + len(grads)]
    tolerance = TOLERANCE | ({torch.float32: ALIBI} if case.bias == "alibi" else {})
    for name, mine, theirs in zip(
        names, (got, got_lse, *grads), (out, lse, *expected), strict=True
    ):
        dtype = torch.float32 if name in ("lse", "db") else case.dtype
        assert mine.dtype == dtype, name
        torch.testing.assert_close(
            *(mine.double(), theirs),
            **tolerance[torch.float32 if name == "lse" else case.dtype],
            msg=partial("{}: {}".format, name),
        )


def chosen(
    query: Tensor, key: Tensor, block: int, topk: int, sinks: int, causal: bool = True
) -> Tensor:
    """Which blocks the kernel attends, bool [B, Hq, Nq, n]: V names each key's block."""
    blocks = -(-key.shape[2] // block)
    value = torch.eye(blocks).repeat_interleave(block, 0)[: key.shape[2]]
    value = value.expand(*key.shape[:2], *value.shape)
    return cpu.forward(
        query, key, value, MobaArguments(block, topk, sinks, scale=0.0, causal=causal)
    )[0].gt(0)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for _, case in TABLE], ids=[name for name, _ in TABLE])
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
def test_every_feature_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for _, case in PAIRS], ids=[name for name, _ in PAIRS])
def test_every_pair_of_features_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype))


@needs_kernel
@given(case=feature_cases())
@settings(max_examples=200)
def test_any_features_together_equal_the_reference(case: Case) -> None:
    assert_like_reference(case)


@needs_kernel
@given(case=cases())
@settings(max_examples=60)
def test_any_problem_equals_the_reference(case: Case) -> None:
    assert_like_reference(case)


@needs_kernel
@pytest.mark.parametrize("block", [3, 48, 96])
def test_blocks_that_no_panel_divides_equal_the_reference(block: int) -> None:
    # Means over 3 * 2**i keys that are multiples of 3 are exact.
    case = Case(queries=200, length=200, block=block, topk=2, dim=16)
    query, key, value = case.inputs()
    assert_like_reference(case, (query, key * 3, value))


@needs_kernel
def test_results_lie_token_major() -> None:
    case = Case(queries=80, length=80, dim=8, value_dim=16)
    q, k, v = case.inputs()
    out, lse = cpu.forward(q, k, v, case.arguments())
    *grads, _ = cpu.backward(torch.ones_like(out), None, q, k, v, out, lse, case.arguments())
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *grads))
    assert lse.is_contiguous()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding": "holes"},
        {"causal": False, "softcap": 2.0},
        {"bias": "all", "scale": 0.25},
        {"packing": "runs", "bias": "by key", "scale": 0.25, "padding": "holes"},
        {"packing": "one token each", "causal": False},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_every_bit_repeats_whatever_the_number_of_threads(
    dtype: torch.dtype, changes: dict[str, Any], threads: None
) -> None:
    case = Case(queries=800, length=800, dim=16, block=32, topk=4, dtype=dtype).but(**changes)
    q, k, v = case.inputs()
    q, k, v = (
        x * torch.rand(()) for x in (q, k, v)
    )  # off the grid: sums now depend on their order
    grad = torch.randn(q.shape[:3] + v.shape[3:]).to(dtype)
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        out, lse = cpu.forward(q, k, v, case.arguments())
        grads = cpu.backward(grad, lse, q, k, v, out, lse, case.arguments())
        runs.append([x for x in (out, lse, *grads) if x is not None])
    for other in runs[1:]:
        for first, again in zip(runs[0], other, strict=True):
            assert torch.equal(first, again)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_query_alone_selects_the_blocks_that_it_selects_among_others(queries: int) -> None:
    """Blocks whose scores differ in the last bit only: any other order of a sum would show."""
    query = torch.randn(1, 4, 400, 33)
    key = torch.randn(1, 2, 1, 33) + 1e-6 * torch.randn(1, 2, 400, 33)
    full = chosen(query, key, 8, 9, 1)
    assert full[..., -1, :].sum(-1).eq(9).all()
    for length in (400, 397, 333):
        part = chosen(query[:, :, length - queries : length], key[:, :, :length], 8, 9, 1)
        assert torch.equal(part, full[:, :, length - queries : length, : part.shape[-1]])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_with_means_given_a_few_queries_read_the_blocks_that_they_select_alone(
    queries: int, dtype: torch.dtype
) -> None:
    case = Case(queries=queries, length=400, topk=3, sinks=1, means="other", dtype=dtype)
    query, key, value = case.inputs()
    means = case.block_means()
    expected = cpu.forward(query, key, value, case.arguments())
    found = reference.select_blocks(query, key, MobaArguments(8, 3, sinks=1, block_means=means))
    read = found.view(2, 2, 2, queries, -1).any(3).any(2).repeat_interleave(8, -1)[..., None]
    assert 0 < read.float().mean() < 0.3
    key, value = (x.masked_fill(~read, torch.nan) for x in (key, value))
    got = cpu.forward(query, key, value, case.arguments())
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("queries", [1, 100], ids=["decode", "prefill"])
def test_ties_go_to_the_lower_block(queries: int) -> None:
    query, key = torch.ones(1, 2, queries, 8), torch.ones(1, 1, 100, 8)
    key[:, :, 40:48] = 2.0  # one block is better, the others are equal
    got = chosen(query, key, 8, 5, 1)
    assert got[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2, 5, 12]
    assert torch.equal(got, reference.select_blocks(query, key, MobaArguments(8, 5, sinks=1)))


@needs_kernel
def test_bidirectional_ties_go_to_the_lower_block_whatever_side_it_is_on() -> None:
    query, key = torch.ones(1, 2, 100, 8), torch.ones(1, 1, 100, 8)
    key[:, :, 72:80] = 2.0  # block 9 is better; the last block, of 4 keys, is as good as the others
    got = chosen(query, key, 8, 5, 1, causal=False)
    expected = [  # the sink, the best, the lowest others, and the own block
        (4, [0, 1, 2, 3, 9]),
        (12, [0, 1, 2, 3, 9]),
        (40, [0, 1, 2, 5, 9]),
        (76, [0, 1, 2, 3, 9]),
        (99, [0, 1, 2, 9, 12]),
    ]
    for token, blocks in expected:
        assert got[0, 0, token].nonzero().flatten().tolist() == blocks, token
    assert torch.equal(
        got, reference.select_blocks(query, key, MobaArguments(8, 5, sinks=1, causal=False))
    )


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"padding": "holes"}, {"causal": False, "softcap": 2.0}, {"bias": "all", "scale": 0.3}],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_a_packed_sequence_gives_what_it_gives_alone_to_the_bit(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Off the grid, so that any other order of a sum would show; lengths are dense and sparse."""
    case = Case(batch=2, queries=900, length=900, dim=16, value_dim=24, block=32, topk=3, sinks=1)
    case = case.but(dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(torch.tensor([0.05, 0.08, 0.3, 0.57]), 1800, True, generator=generator)
    ids = ids.view(2, 900)  # interleaved
    ids[1], _ = ids[1].sort()  # one after the other
    q, k, v = (x * torch.rand((), dtype=dtype) for x in case.inputs())
    grad, grad_lse = torch.randn(q.shape[:3] + v.shape[3:]).to(dtype), torch.randn(q.shape[:3])
    mask, bias = case.key_mask(), case.key_bias()
    packing = replace(case.arguments(), segments=ids)
    out, lse = cpu.forward(q, k, v, packing)
    grads = cpu.backward(grad, grad_lse, q, k, v, out, lse, packing)
    packed = [x for x in (out, lse, *grads) if x is not None]
    for row, sequence in itertools.product(range(2), range(4)):
        at = ids[row].eq(sequence).nonzero().flatten()
        assert len(at) * case.group > 32, "a shorter one alone runs the path of a few queries"

        def alone(x: Tensor, row: int = row, at: Tensor = at) -> Tensor:
            return x[row : row + 1, :, at]

        arguments = replace(
            case.arguments(),
            key_mask=None if mask is None else mask[row : row + 1, at],
            key_bias=None if bias is None else alone(bias),
        )
        tensors = [alone(x) for x in (q, k, v)]
        out, lse = cpu.forward(*tensors, arguments)
        grads = cpu.backward(alone(grad), alone(grad_lse), *tensors, out, lse, arguments)
        single = [x for x in (out, lse, *grads) if x is not None]
        for name, mine, theirs in zip(
            ("out", "lse", "dq", "dk", "dv", "db"), packed, single, strict=False
        ):
            assert torch.equal(alone(mine), theirs), (name, row, sequence)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 3, 200])
def test_a_query_among_packed_sequences_selects_what_it_selects_alone(queries: int) -> None:
    """One query at a time, of interleaved sequences, with scores that differ in the last bit."""
    query = torch.randn(1, 4, 400, 33)
    key = torch.randn(1, 2, 1, 33) + 1e-6 * torch.randn(1, 2, 400, 33)
    value = torch.eye(400).expand(1, 2, 400, 400)  # names the keys that are attended
    bias = 1e-6 * torch.randn(1, 4, 400)
    ids = torch.arange(400)[None] % 3
    arguments = MobaArguments(8, 5, 1, scale=1e-3, key_bias=bias, segments=ids)
    full = cpu.forward(query, key, value, arguments)[0].gt(0)
    part = cpu.forward(query[:, :, 400 - queries :], key, value, arguments)[0].gt(0)
    assert full[..., -1, :].sum(-1).gt(32).all()
    assert torch.equal(part, full[:, :, 400 - queries :])
    arguments = replace(arguments, segments=ids.int())
    assert torch.equal(cpu.forward(query, key, value, arguments)[0].gt(0), full)


@needs_kernel
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_thousands_of_short_sequences_equal_the_reference_of_each(causal: bool) -> None:
    lengths = torch.randint(1, 13, (1000,), generator=torch.Generator().manual_seed(0))
    total = int(lengths.sum())
    ids = torch.arange(1000).mul(-(2**40)).repeat_interleave(lengths)[None]
    case = Case(batch=1, queries=total, length=total, causal=causal, block=2, topk=3, sinks=1)
    q, k, v = case.inputs()
    grad = torch.randint(-8, 9, q.shape) / 8
    arguments = replace(case.arguments(), segments=ids)
    out, lse = cpu.forward(q, k, v, arguments)
    grads = cpu.backward(grad, None, q, k, v, out, lse, arguments)[:3]
    for length in range(1, 13):  # all sequences of a length are one batch for the reference
        starts = (lengths.cumsum(0) - lengths)[lengths == length]
        at = starts[:, None] + torch.arange(length)
        leaves = [x[0, :, at].transpose(0, 1).clone().requires_grad_() for x in (q, k, v)]
        expected, expected_lse = reference.moba_attention(
            *leaves, MobaArguments(2, 3, sinks=1, causal=causal)
        )
        given = grad[0, :, at].transpose(0, 1)
        theirs = [expected, *torch.autograd.grad(expected, leaves, given)]
        for mine, their in zip((out, *grads), theirs, strict=True):
            mine = mine[0, :, at].transpose(0, 1)
            torch.testing.assert_close(mine, their, **TOLERANCE[torch.float32])
        torch.testing.assert_close(lse[0, :, at].transpose(0, 1), expected_lse)


@needs_kernel
def test_softcap_is_tanh_near_zero_and_where_it_saturates() -> None:
    """With one key, lse is the score: c tanh(x / c), to three units in the last place."""
    sizes = torch.logspace(-20, 6, 4001)
    x = torch.cat([-sizes, sizes, torch.linspace(-0.62, -0.58, 999), torch.tensor([0.0])])
    query, key = x[:, None, None, None], torch.ones(len(x), 1, 1, 1)
    for cap in (1.0, 30.0):
        out, lse = cpu.forward(query * cap, key, key, MobaArguments(1, 1, scale=1.0, softcap=cap))
        expected = cap * (query.flatten().double() * cap / cap).tanh()
        error = (lse.flatten().double() - expected).abs()
        assert (error <= 3 * 2**-23 * expected.abs()).all()
        assert torch.equal(out, torch.ones_like(out))
    extremes = torch.tensor([torch.inf, -torch.inf])[:, None, None, None]
    ones = torch.ones_like(extremes)
    lse = cpu.forward(extremes, ones, ones, MobaArguments(1, 1, scale=1.0, softcap=30.0))[1]
    torch.testing.assert_close(lse.flatten(), torch.tensor([30.0, -30.0]))


@needs_kernel
@pytest.mark.parametrize("queries", [2, 100], ids=["decode", "prefill"])
def test_a_constant_in_the_bias_changes_lse_alone(queries: int) -> None:
    """However large: ALiBi's slope times key index must not round the scores away."""
    q, k, v = Case(queries=queries, length=100, topk=20).inputs()
    bias = torch.randint(-16, 17, (2, 4, 100)) / 8
    arguments = MobaArguments(8, 20, scale=0.25, key_bias=bias)
    out, lse = cpu.forward(q, k, v, arguments)
    shifted, shifted_lse = cpu.forward(q, k, v, replace(arguments, key_bias=bias + 4096))
    assert torch.equal(out, shifted)
    torch.testing.assert_close(shifted_lse - 4096, lse, rtol=0, atol=2**-11)  # half a unit of 4096


@needs_kernel
def test_large_scores_do_not_overflow_and_a_nan_stays_in_its_row() -> None:
    case = Case(queries=60, length=60, topk=3)
    q, k, v = case.inputs()
    q = q * 1e4
    expected, expected_lse = reference.moba_attention(q, k, v, MobaArguments(case.block, case.topk))
    out, lse = cpu.forward(q, k, v, case.arguments())
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)  # lse 1e4 has unit 1e-3
    torch.testing.assert_close(lse, expected_lse)
    q[0, 1, 33] = torch.nan
    again = cpu.forward(q, k, v, case.arguments())[0]
    assert again[0, 1, 33].isnan().all()
    again[0, 1, 33] = out[0, 1, 33]
    assert torch.equal(again, out)


@needs_kernel
def test_an_empty_problem_gives_empty_results() -> None:
    q, k, v = torch.empty(2, 4, 0, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out, lse = cpu.forward(q, k, v, MobaArguments(2, 2))
    assert out.shape == (2, 4, 0, 8)
    *grads, _ = cpu.backward(out, None, q, k, v, out, lse, MobaArguments(2, 2))
    assert [x.count_nonzero().item() for x in grads] == [0, 0, 0]
    assert grads[1].shape == k.shape


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sequence", "padding"),
    [(None, 1), (1024, 1), (48, 1), (17, 32 / 17), (3, 4 / 3), (1, 2)],
    ids=lambda x: f"{x:.2f}" if isinstance(x, float) else f"{x}",
)
def test_scratch_is_a_few_copies_of_key_and_value(
    sequence: int | None,
    padding: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
) -> None:
    used: list[int] = []
    call = cpu.call

    def record(*arguments: Any) -> int:
        used.append(call(*arguments))
        return used[-1]

    monkeypatch.setattr(cpu, "call", record)
    torch.set_num_threads(2)
    sizes = {}
    for length in (4096, 8192):
        q, k, v = (torch.randn(1, h, length, 64, dtype=dtype) for h in (4, 2, 2))
        ids = None if sequence is None else torch.arange(length)[None] // sequence
        arguments = MobaArguments(64, 4, 1, segments=ids)
        out, lse = cpu.forward(q, k, v, arguments)
        cpu.backward(out, None, q, k, v, out, lse, arguments)
        sizes[length] = used[-2:]
    for index, copies in enumerate((2, 3)):
        grown = sizes[8192][index] - sizes[4096][index]
        width = cpu_build.compute_dtype(cpu_build.load(), dtype).itemsize
        packed = copies * width * k[:, :, 4096:].numel()
        means = 2 * 64 * 64 * 4 * 2
        assert (
            grown <= 1.1 * padding * packed + means + 2 * 2**20
        )  # and each thread's unit has more rows


FAKE_COMPILER = """
import pathlib, sys, time
log = pathlib.Path({log!r})
if "--version" in sys.argv:
    print("fake 1.0")
    sys.exit()
with log.open("a") as file:
    file.write(" ".join(sys.argv) + "\\n")
time.sleep(0.1)
if any(flag in sys.argv for flag in {refuse!r}):
    sys.exit("unsupported option")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("library")
"""


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, refuse: tuple[str, ...]) -> Path:
    script, log = folder / "compiler.py", folder / "log"
    script.write_text(FAKE_COMPILER.format(log=str(log), refuse=refuse))
    monkeypatch.setenv("CXX", shlex.join([sys.executable, str(script)]))
    return log


def test_a_missing_compiler_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    expected = (
        "no C++ compiler found (CXX=/nowhere/g++ -m64 is no program): install g++ "
        "(apt-get install g++), or set CXX to a C++17 compiler"
    )
    assert cpu.available() == expected
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="apt-get install g"):
        cpu.forward(q, q, q, MobaArguments(2, 2))
    cpu_build.library.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh_build))
    assert "no g++, c++ or clang++ on PATH" in str(cpu.available())


def test_a_failing_compiler_is_a_reason_with_its_message(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=("-std=c++17",))
    assert "It said: unsupported option" in str(cpu.available())
    assert len(log.read_text().splitlines()) == len(cpu_build.EXTRAS)
    assert not list((fresh_build / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    (fresh_build / "file").touch()
    monkeypatch.setenv("MOONFX_CACHE_DIR", str(fresh_build / "file" / "cache"))
    assert "set MOONFX_CACHE_DIR to a folder" in str(cpu.available())


def test_a_library_that_cannot_be_loaded_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    assert "loaded from" in str(cpu.available())


def test_without_openmp_or_native_the_kernel_is_still_built(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=("-fopenmp", "-mcpu=native"))
    cpu_build.build()
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    assert "-march=native" in lines[-1]
    assert "-fopenmp" not in lines[-1]


BUILDS = [
    ("SSE, without OpenMP", "g++", "-march=x86-64"),
    ("AVX2, without OpenMP", "g++", "-march=x86-64-v3"),
    ("clang, AVX-512", "clang++", "-march=x86-64-v4"),
]
# What a register's width decides: dims and keys that fill none, several, or not all of one.
BUILT = [
    Case(queries=333, length=333, block=32, topk=3, dim=24, value_dim=40),
    Case(queries=3, length=200, block=16, topk=3, sinks=1, dim=33),
    Case(queries=90, length=90, topk=3, packing="runs", softcap=0.5, bias="all", scale=0.25),
    Case(queries=90, length=90, topk=3, packing="one token each", padding="holes", dim=64),
]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64, whose flags it gives")
@pytest.mark.parametrize(
    ("compiler", "flag"), [row[1:] for row in BUILDS], ids=[x[0] for x in BUILDS]
)
def test_other_compilers_and_processors_compute_the_same(
    compiler: str, flag: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    needed = {"-march=x86-64-v3": " avx2 ", "-march=x86-64-v4": " avx512dq "}.get(flag, "")
    if shutil.which(compiler) is None or needed not in cpu_build.processor():
        pytest.skip(f"needs {compiler} and a processor with{needed or ' SSE'}")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(cpu_build, "FLAGS", [x.replace("-O3", "-O1") for x in cpu_build.FLAGS])
    monkeypatch.setattr(cpu_build, "EXTRAS", ((flag,),))
    assert cpu.available() is None
    runs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        for case, dtype in itertools.product(BUILT, DTYPES):
            assert_like_reference(case.but(dtype=dtype))
        tensors = BUILT[0].inputs()
        runs.append(cpu.forward(*tensors, BUILT[0].arguments())[0])
    assert torch.equal(*runs)


def test_the_first_build_says_that_it_compiles_and_later_ones_nothing(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    path = cpu_build.build()
    said = capfd.readouterr().err
    assert said.startswith("moonfx: compiling its CPU kernel")
    assert str(path) in said
    assert len(said.splitlines()) == 1
    cpu_build.build()
    assert capfd.readouterr().err == ""


def test_builds_that_race_leave_one_library_and_nothing_else(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=())
    paths: list[Path] = []
    race = [threading.Thread(target=lambda: paths.append(cpu_build.build())) for _ in range(3)]
    for thread in race:
        thread.start()
    for thread in race:
        thread.join()
    assert len(set(paths)) == 1
    assert list((fresh_build / "cache").iterdir()) == paths[:1]
    compiled = len(log.read_text().splitlines())
    assert cpu_build.build() == paths[0]
    assert len(log.read_text().splitlines()) == compiled  # the second time it is only found


def test_another_compiler_or_flag_gives_another_library(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    first = cpu_build.build()
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -O1")
    second = cpu_build.build()
    monkeypatch.setattr(cpu_build, "FLAGS", [*cpu_build.FLAGS, "-g"])
    assert len({first, second, cpu_build.build()}) == 3
