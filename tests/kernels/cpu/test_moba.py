"""The C++ kernel against the reference; its determinism, its precision, its memory."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from tests.support.cpu_kernel import DTYPES, assert_like_reference, needs_kernel
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, Case, cases, feature_cases

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
    shifted, shifted_lse = cpu.forward(q, k, v, arguments._replace(key_bias=bias + 4096))
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
