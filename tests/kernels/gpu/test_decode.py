"""Attention of a few queries on a GPU: as the reference says, and each block read once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case, feature_cases
from tests.support.no_waits import NoWaits

gpu = pytest.importorskip("moonfx.kernels.gpu.moba", reason="needs Triton")
from moonfx.kernels.gpu import decode as gpu_decode  # noqa: E402
from moonfx.kernels.gpu import problem as gpu_problem  # noqa: E402
from moonfx.kernels.gpu.problem import Layout  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32: sums of at most 150 products of size 1, on the chip from three TF32 parts. 16-bit: the
# weights of a split are rounded to the dtype, and the result once more: a few half units of 1.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
}


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def routes_of(query: Tensor, key: Tensor, arguments: MobaArguments, layout: Layout) -> Tensor:
    """The reference's choice as int32 [B, Hkv, R, K], a row's columns in no special order."""
    batch, length, queries = len(key), key.shape[2], query.shape[2]
    real = torch.ones(batch, length, dtype=torch.bool)
    real = real if arguments.key_mask is None else arguments.key_mask
    ids = torch.zeros(batch, length) if arguments.segments is None else arguments.segments
    mine = ids[:, length - queries :]
    place = torch.arange(queries).expand(batch, -1)
    if layout.queries.index is not None:
        place = layout.queries.index.long()
    first = torch.empty_like(place).scatter_(1, place, layout.queries.first.long())
    routes = torch.full((*query.shape[:3], layout.topk), -1)
    for sequence in ids.unique():
        chosen = reference.select_blocks(
            query,
            key,
            arguments._replace(
                block=layout.block,
                topk=layout.topk,
                sinks=layout.sinks,
                key_mask=real & ids.eq(sequence),
            ),
        )
        blocks = chosen.shape[-1]
        number = torch.where(chosen, torch.arange(blocks), blocks)
        number = F.pad(number.sort(-1).values, (0, layout.topk), value=blocks)[..., : layout.topk]
        number = torch.where(number < blocks, number + first[:, None, :, None], -1)
        routes = torch.where(mine.eq(sequence)[:, None, :, None], number, routes)
    turn = torch.rand(routes.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    routes = routes.gather(-1, turn)
    routes = routes.gather(2, place[:, None, :, None].expand(routes.shape))
    routes = routes.unflatten(1, (key.shape[1], -1)).transpose(2, 3).flatten(2, 3)
    return routes.int().contiguous()


def decode(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor]:
    layout = gpu_problem.layout(query, key, arguments)
    assert gpu_decode.fits(query, layout)
    routes = routes_of(query, key, arguments, layout).to(DEVICE)
    moved = {n: x.to(DEVICE) for n, x in arguments._asdict().items() if isinstance(x, Tensor)}
    arguments = arguments._replace(**moved)
    inputs = [x.to(DEVICE) for x in (query, key, value)]
    layout = gpu_problem.layout(*inputs[:2], arguments)
    with NoWaits():
        out, lse = gpu_decode.attend(*inputs, layout, routes, arguments)
    return out.cpu(), lse.cpu()


def assert_like_reference(case: Case) -> None:
    inputs = case.inputs()
    out, lse = decode(*inputs, case.arguments())
    expected = reference.moba_attention(*inputs, case.arguments())
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, expected[0], **TOLERANCE[case.dtype])
    torch.testing.assert_close(lse, expected[1], **TOLERANCE[torch.float32])


CASES = [
    *((f"batch {b}", Case(batch=b, kv_heads=1, queries=1, length=61, topk=3)) for b in range(1, 6)),
    *((f"{q} queries", Case(batch=1, queries=q, length=61, topk=3, sinks=1)) for q in range(2, 9)),
    *((f"{g} heads to a kv head", Case(batch=1, queries=2, length=61, group=g, kv_heads=1, topk=3))
      for g in (1, 3, 8)),
    ("as many rows as fit", Case(batch=1, kv_heads=1, group=8, queries=8, length=61)),
    ("more columns than blocks", Case(queries=2, length=33, topk=4)),
    ("dense", Case(queries=2, topk=5)),
    ("dense, one key", Case(queries=1, length=1)),
    ("one block per query", Case(queries=3, topk=1)),
    ("blocks of one key", Case(queries=2, length=12, block=1, topk=3)),
    ("blocks not of a tile's size", Case(queries=2, length=150, block=50, topk=2)),
    ("blocks in splits", Case(queries=3, length=330, block=100, topk=2, batch=1)),
    ("block not a power of two, value wider", Case(queries=2, block=6, value_dim=72, kv_heads=1)),
    ("head dims that are no power of two", Case(queries=2, dim=12, value_dim=20, kv_heads=1)),
    *((f"padding: {p}", Case(queries=3, padding=p, topk=3, sinks=1, kv_heads=1))
      for p in ("left", "right", "holes", "one row empty")),
    *((f"packing: {p}", Case(queries=5, packing=p, topk=3, sinks=1, length=70, kv_heads=1))
      for p in ("runs", "interleaved", "one token each", "one row whole")),
    ("packing and padding", Case(queries=5, packing="runs", padding="holes", length=70, topk=3)),
    ("softcap", Case(queries=2, softcap=0.5)),
    ("negative scale", Case(queries=2, scale=-1.0)),
    *((f"bias: {b}", Case(queries=2, bias=b, scale=0.25, topk=3)) for b in ("all", "by row")),
    ("bidirectional", Case(queries=7, length=7, block=2, topk=2, causal=False, group=3)),
    ("means given", Case(queries=2, means="other", topk=3, padding="left")),
    *((f"layout: {x}", Case(queries=2, layout=x, kv_heads=1))
      for x in ("by token", "expanded", "strided")),
    ("everything", Case(queries=5, packing="interleaved", padding="left", length=130, group=3,
                        softcap=2.0, bias="by head", scale=0.25, topk=3, value_dim=24,
                        kv_heads=1, layout="by token")),
]  # fmt: skip


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_a_few_queries_are_as_the_reference_says(case: Case) -> None:
    assert_like_reference(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_are_rounded_no_more_than_in_prefill(dtype: torch.dtype) -> None:
    case = Case(queries=2, length=61, topk=3, dim=16, dtype=dtype, padding="left", softcap=2.0)
    assert_like_reference(case)


@settings(max_examples=12)
@given(feature_cases())
def test_whatever_has_few_rows_is_as_the_reference_says(case: Case) -> None:
    queries = min(case.queries, 3) if case.causal else case.length
    case = case.but(queries=queries, batch=min(case.batch, 2), kv_heads=1, length=case.length)
    if queries * case.group <= gpu_decode.MOST_ROWS and queries <= 16:
        assert_like_reference(case)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_rows_of_decoding_are_rows_of_a_prefill(padding: str) -> None:
    case = Case(batch=2, kv_heads=1, length=53, queries=53, topk=3, sinks=1, padding=padding)
    query, key, value = case.inputs()
    whole = reference.moba_attention(query, key, value, case.arguments())
    mask = case.key_mask()
    for count, end in ((1, 53), (4, 50), (1, 41), (2, 17), (1, 8)):
        part = query[:, :, end - count : end], key[:, :, :end], value[:, :, :end]
        arguments = case.arguments()._replace(key_mask=None if mask is None else mask[:, :end])
        few = decode(*part, arguments)
        for mine, theirs in zip(few, whole, strict=True):
            rows = theirs[:, :, end - count : end]
            torch.testing.assert_close(mine, rows, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_step_with_means_from_a_cache_is_a_row_of_a_prefill(padding: str) -> None:
    case = Case(batch=2, kv_heads=1, length=61, queries=61, topk=3, sinks=1, padding=padding)
    query, key, value = case.inputs()
    whole = reference.moba_attention(query, key, value, case.arguments())
    step = [x.to(DEVICE) for x in (query[:, :, -2:], key, value)]
    arguments = case.but(means="exact").arguments(DEVICE)
    out, lse, _ = gpu.forward(*step, arguments)
    torch.testing.assert_close(out.cpu(), whole[0][:, :, -2:], **TOLERANCE[torch.float32])
    torch.testing.assert_close(lse.cpu(), whole[1][:, :, -2:], **TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("sizes", [(4096, 3, 20000), (128, 8, 5000)], ids=["large", "small"])
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (1, 8), (7, 3), (256, 1)])
def test_steps_of_real_sizes_are_as_the_reference_says(
    batch: int, queries: int, sizes: tuple[int, int, int], padding: str
) -> None:
    block, topk, length = sizes
    case = Case(batch=batch, queries=queries, length=length // max(1, batch // 8), block=block)
    case = case.but(topk=topk, group=4, dim=64, value_dim=64, kv_heads=2, sinks=1, padding=padding)
    assert_like_reference(case.but(dtype=torch.bfloat16))


@pytest.mark.skipif(
    DEVICE == "cuda", reason="needs the interpreter, whose reads it counts: a CUDA device is here"
)
def test_each_chosen_block_is_read_once_for_all_the_rows_that_chose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(batch=2, kv_heads=2, group=4, queries=4, length=200, block=32, topk=3)
    read = 0
    advance = gpu_decode.advance

    def counting(*arguments: Any) -> Any:
        nonlocal read
        begin, end = (int(arguments[place].handle.data[0]) for place in (6, 7))
        read += max(0, end - begin)
        return advance(*arguments)

    monkeypatch.setattr(gpu_decode, "advance", counting)
    query, key, value = case.inputs()
    layout = gpu_problem.layout(query, key, case.arguments())
    routes = routes_of(query, key, case.arguments(), layout)
    gpu_decode.attend(query, key, value, layout, routes, case.arguments())
    distinct = [set(rows.flatten().tolist()) for rows in routes.flatten(0, 1)]
    expected = sum(min(32, 200 - 32 * block) for blocks in distinct for block in blocks)
    assert routes.numel() > sum(len(blocks) for blocks in distinct) * 2  # there is much to share
    assert read == expected


def test_passes_within_the_budget_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=3, queries=2, length=61, topk=3, padding="left")
    inputs, arguments = case.inputs(), case.arguments()
    whole = decode(*inputs, arguments)
    for budget in (1, 5 * 12 * 4 * 9):
        monkeypatch.setattr(gpu_decode, "BUDGET", budget)
        for mine, theirs in zip(decode(*inputs, arguments), whole, strict=True):
            assert torch.equal(mine, theirs)


SPLITS = [  # batch * kv heads, topk, block, keys of a tile; splits, keys of a split
    ("one long sequence, large blocks", (8, 12, 4096, 64), (11, 384)),
    ("one long sequence, small blocks", (8, 8, 128, 64), (2, 64)),
    ("256 sequences, large blocks", (2048, 12, 4096, 64), (1, 4096)),
    ("256 sequences, small blocks", (2048, 8, 128, 64), (1, 128)),
    ("dense, one kv head", (1, 1, 40000, 64), (625, 64)),
    ("a block smaller than a tile", (1, 8, 7, 16), (1, 16)),
]


@pytest.mark.parametrize(("sizes", "expected"), [row[1:] for row in SPLITS])
def test_blocks_are_split_to_fill_the_chip_and_no_further(
    sizes: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert gpu_decode.split(*sizes) == expected


FITS = [  # queries, group, topk
    (1, 1, 8, True),
    (8, 8, 64, True),
    (8, 8, 65, False),
    (1, 4, 256, True),
    (1, 4, 257, False),
    (8, 9, 8, False),
    (0, 4, 8, False),
]


@pytest.mark.parametrize(("queries", "group", "topk", "fits"), FITS)
def test_a_call_fits_by_its_rows_and_routes(
    queries: int, group: int, topk: int, fits: bool
) -> None:
    case = Case(kv_heads=1, group=group, queries=queries, length=1000, block=1, topk=topk)
    query, key, _ = case.inputs()
    assert gpu_decode.fits(query, gpu_problem.layout(query, key, case.arguments())) == fits
