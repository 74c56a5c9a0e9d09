"""Gradients on a GPU (under Triton's interpreter where there is none) against autograd's."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu import backward_schedule as gpu_backward_plan
from moonfx.kernels.gpu import block_index as gpu_index
from moonfx.kernels.gpu.problem import Layout, layout
from moonfx.kernels.reference import moba as reference
from tests.kernels.torch_ops.test_moba import TOLERANCE
from tests.support.moba_cases import FEATURES, Case
from tests.support.no_waits import NoWaits

NAMES = ("dq", "dk", "dv", "dbias")


def routes_of(query: Tensor, key: Tensor, of: Layout, arguments: MobaArguments) -> Tensor:
    """int32 [B, Hkv, R, K] by the definition, from the layout's slots."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk = key.shape[1:3]
    bias = torch.zeros(1) if arguments.key_bias is None else arguments.key_bias.nan_to_num()
    bias = bias.expand(B, Hq, Nk).unflatten(1, (Hkv, of.group))
    place = torch.arange(Nk).expand(B, Nk) if of.blocks.token is None else of.blocks.token.long()
    keys = key.float().nan_to_num().gather(2, place[:, None, :, None].expand(B, Hkv, Nk, D))
    bias = bias.gather(3, place[:, None, None].expand(B, Hkv, of.group, Nk))
    slot = torch.arange(Nk)
    start, size = of.blocks.start[..., None], of.blocks.size[..., None]
    inside = ((slot >= start) & (slot < start + size)).float()  # [B, n, Nk]
    share = inside / size.clamp(min=1)
    means, biases = share[:, None] @ keys, share[:, None] @ bias.mT  # [B, Hkv, n, D or G]
    index = torch.arange(Nq).expand(B, Nq) if of.queries.index is None else of.queries.index.long()
    rows = query.float().gather(2, index[:, None, :, None].expand(query.shape))
    rows = rows.unflatten(1, (Hkv, of.group)).transpose(2, 3)  # [B, Hkv, Nq, G, D]
    score = torch.einsum("bhqgd,bhnd->bhqgn", rows, means)
    score = score + biases.mT[:, :, None] / (arguments.scale or 1.0)
    number = torch.arange(of.n)
    own, first, end = (
        x[:, None, :, None, None] for x in (of.queries.own, of.queries.first, of.queries.end)
    )
    end = end.where(own >= 0, -1)
    able = (number >= first) & (number < end) & (number != own)
    score = score.masked_fill(able & (number < first + of.sinks), torch.inf)
    best = score.masked_fill(~able, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = best.masked_fill(~able.expand(score.shape).gather(-1, best), -1)
    best = torch.nn.functional.pad(best, (0, of.topk), value=-1)[..., : of.topk - 1]
    routes = torch.cat([own.expand(*best.shape[:-1], 1), best], -1)
    return routes.flatten(2, 3).int()


def index_of(routes: Tensor, n: int) -> gpu_index.Index:
    """What block_index.build gives, by torch: in one chunk."""
    heads = routes.shape[0] * routes.shape[1]
    blocks = routes.view(heads, -1).long()
    blocks = (blocks + torch.arange(heads)[:, None] * n).where(blocks >= 0, heads * n).flatten()
    entries = blocks.sort(stable=True).indices % routes[0, 0].numel()
    starts = torch.searchsorted(blocks.sort().values, torch.arange(heads * n + 1))
    return gpu_index.Index(routes.contiguous(), entries.int(), starts, n, 1, routes.shape[2])


def small(case: Case) -> Case:
    """The interpreter takes a millisecond per operation of a program."""
    length = min(case.length, 48)
    return case.but(kv_heads=1, length=length, queries=min(case.queries, length))


def problem(case: Case) -> tuple[Any, ...]:
    """What the kernel is given after the gradients."""
    inputs, arguments = case.inputs(), case.arguments()
    with torch.no_grad():
        out, lse = reference.moba_attention(*inputs, arguments)
    of = layout(inputs[0], inputs[1], arguments)
    index = None
    if of.n > 1:
        index = index_of(routes_of(*inputs[:2], of, arguments), of.n)
    return *inputs, out, lse, of, index, arguments


def upstream(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients on the grid: exact in every dtype."""
    return (torch.randint(-8, 9, out.shape) / 8).to(out), (torch.randint(-8, 9, lse.shape) / 8).to(
        lse
    )


def assert_like_reference(case: Case) -> None:
    given = problem(case)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    bias = case.full_bias()
    arguments = case.arguments()._replace(key_bias=bias)
    out, lse = reference.moba_attention(*leaves, arguments)
    grads = upstream(out, lse)
    leaves += [] if bias is None else [bias]
    expected = torch.autograd.grad((out, lse), leaves, grads)
    got = [grad for grad in gpu_backward.gradients(*grads, *given) if grad is not None]
    for name, mine, theirs in zip(NAMES[: len(expected)], got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        torch.testing.assert_close(
            mine, theirs, **TOLERANCE[case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


IN_BFLOAT16 = (
    *("bidirectional, sinks", "softcap", "bias: by head", "bias, padding: holes"),
    *("packing and padding: left", "packing, dense", "everything"),
)
SHAPES = [
    ("dense", Case(topk=9)),
    ("dense, padded", Case(topk=9, padding="left")),
    ("dense, some rows see nothing", Case(topk=9, padding="one row empty", bias="all", scale=0.25)),
    ("dense, fewer queries", Case(topk=9, queries=11, group=3)),
    ("own block only, of 1.25 tiles", Case(topk=1, block=40, length=90, queries=90)),
    ("own block only, holes", Case(topk=1, padding="holes", length=70, queries=70)),
    ("values wider", Case(topk=3, sinks=1, value_dim=40)),
    ("values narrower", Case(topk=3, sinks=1, dim=24, value_dim=4, scale=0.25)),
    ("fewer queries", Case(topk=3, queries=9)),
    ("every other number in memory", Case(topk=3, layout="strided")),
    ("one tensor for all heads", Case(topk=3, layout="expanded")),
]


@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_equals_the_reference(case: Case) -> None:
    assert_like_reference(small(case))


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_features_equal_the_reference_in_bfloat16(name: str) -> None:
    assert_like_reference(small(dict(FEATURES)[name]).but(dtype=torch.bfloat16))


@pytest.mark.parametrize("case", [case for _, case in SHAPES], ids=[name for name, _ in SHAPES])
def test_each_shape_equals_the_reference(case: Case) -> None:
    assert_like_reference(case.but(kv_heads=1))


def random(case: Case, *, chunks: bool = False) -> tuple[Any, ...]:
    """A problem off the grid, where another order of summation would show."""
    torch.manual_seed(1)
    query, key, value, _, _, of, index, arguments = problem(case)
    if chunks:
        index = gpu_index.build(index.routes, of.n)
    query, key, value = (torch.randn_like(x) for x in (query, key, value))
    # Any out and lse will do: rows of P need not sum to 1.
    out = torch.randn(*query.shape[:3], value.shape[3])
    lse = torch.rand(query.shape[:3]) + 2
    return (
        torch.randn_like(out),
        torch.randn_like(lse),
        query,
        key,
        value,
        out,
        lse,
        of,
        index,
        arguments,
    )


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of a pass, to be set; each element that is appended is one number of passes."""
    original, counts = gpu_index.passes, [gpu_index.BUDGET]

    def passes(index: gpu_index.Index, width: int) -> list[gpu_index.Pass]:
        found = list(original(index, width, counts[0]))
        counts.append(len(found))
        return found

    monkeypatch.setattr(gpu_index, "passes", passes)
    return counts


def test_gradients_repeat_bit_for_bit_in_any_number_of_passes(budgets: list[int]) -> None:
    case = Case(batch=1, kv_heads=2, topk=3, sinks=1, bias="all", scale=0.25)
    given, runs = random(case, chunks=True), []
    for budgets[0] in (1 << 28, 1 << 28, 1 << 12, 1):
        runs.append(gpu_backward.gradients(*given))
    assert budgets[1:3] == [1, 1]
    assert 1 < budgets[3] < budgets[4]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_list_that_is_cut_adds_up_to_the_same(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=1, topk=3, sinks=1, length=64, queries=64, bias=bias, scale=0.25)
    monkeypatch.setattr(gpu_backward_plan, "SHORT", 16)
    monkeypatch.setattr(gpu_backward_plan, "SPLIT", 1 << 17)  # 32 tiles or more
    given = problem(case)
    of, index = given[5:7]
    todo = gpu_backward_plan.plan(index, of, 2, 16, 1 << 10)
    assert (todo.items[:, 6] > 1).any()  # parts
    assert_like_reference(case)
    runs = [gpu_backward.gradients(*random(case)) for _ in range(2)]
    for once, again in zip(*runs, strict=True):
        assert once is again is None or torch.equal(once, again)


PLANS = [
    ("causal", Case(topk=3, sinks=1, length=90, queries=90)),
    ("fewer queries", Case(topk=3, length=90, queries=25)),
    ("holes", Case(topk=3, sinks=1, padding="holes", length=90, queries=90)),
    ("dense, padded", Case(topk=20, padding="left", length=90, queries=60)),
    ("packed", Case(packing="interleaved", padding="holes", topk=3, length=90, queries=90)),
    ("bidirectional", Case(causal=False, topk=3, length=90, queries=90)),
]


@pytest.mark.parametrize("case", [case for _, case in PLANS], ids=[name for name, _ in PLANS])
@pytest.mark.parametrize("split", [0, 1 << 10, 1 << 20])
def test_a_plan_has_each_row_and_key_that_see_each_other_once(
    case: Case, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_backward_plan, "SHORT", 16)
    monkeypatch.setattr(gpu_backward_plan, "SPLIT", split)
    case = case.but(kv_heads=1, block=16)
    _, _, _, _, _, of, index, _ = problem(case)
    with NoWaits():
        todo = gpu_backward_plan.plan(index, of, 1, 8, 64)
    rows = case.queries * case.group
    bounds = [b * rows for b in range(case.batch + 1)]
    if index is not None:
        bounds = index.starts[:: index.chunks].tolist()
    seen = []
    places = [int(row[5]) for row in todo.items if row[0] >= 0 and row[5] >= 0]
    assert len(places) == len(set(places))
    assert max(places, default=-1) < max(todo.places, 1)
    for block, offset, begin, whole, end, *_ in todo.items.tolist():
        if block < 0:
            continue
        b, number = divmod(block, of.n)
        start, size = int(of.blocks.start[b, number]), int(of.blocks.size[b, number])
        slots = range(start + offset, start + min(offset + 8, size))
        assert begin <= whole <= end <= bounds[block + 1]
        for at in range(begin, end):
            row = at - bounds[block] if index is None else int(index.entries[at]) // of.topk
            last = int(of.queries.last[b, row // of.group])
            assert at < whole or last >= slots[-1]
            seen += [(b, row, slot) for slot in slots if slot <= last]
    expected = []
    for block in range(case.batch * of.n):
        b, number = divmod(block, of.n)
        start, size = int(of.blocks.start[b, number]), int(of.blocks.size[b, number])
        for at in range(bounds[block], bounds[block + 1]):
            row = at - bounds[block] if index is None else int(index.entries[at]) // of.topk
            last = int(of.queries.last[b, row // of.group])
            expected += [(b, row, s) for s in range(start, start + size) if s <= last]
    assert sorted(seen) == sorted(expected)


def test_a_group_sums_what_its_heads_give_alone() -> None:
    case = Case(batch=1, kv_heads=1, group=3, topk=1, bias="all", scale=0.25)
    given = random(case)
    _, _, query, key, value, *_, arguments = given
    of = layout(query, key.expand(-1, 3, -1, -1), arguments)
    index = index_of(routes_of(query, key.expand(-1, 3, -1, -1), of, arguments), of.n)
    wide = [x.expand(-1, 3, -1, -1) for x in (key, value)]
    together = gpu_backward.gradients(*given)
    alone = gpu_backward.gradients(*given[:3], *wide, *given[5:7], of, index, arguments)
    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
    torch.testing.assert_close(together[0], alone[0], **close)
    torch.testing.assert_close(together[1], alone[1].sum(1, keepdim=True), **close)
    torch.testing.assert_close(together[2], alone[2].sum(1, keepdim=True), **close)
    torch.testing.assert_close(together[3], alone[3], **close)


def test_a_missing_lse_gradient_is_zero() -> None:
    given = problem(Case(batch=1, kv_heads=1, topk=3))
    grad_out, grad_lse = upstream(*given[3:5])
    without = gpu_backward.gradients(grad_out, None, *given)
    with_zero = gpu_backward.gradients(grad_out, torch.zeros_like(grad_lse), *given)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_zero[:3], strict=True))


@pytest.mark.parametrize("topk", [3, 9])
def test_padding_and_rows_that_see_nothing_get_zero(topk: int) -> None:
    case = Case(kv_heads=1, topk=topk, padding="one row empty", bias="all", scale=0.25)
    given, mask = problem(case), case.key_mask()
    assert mask is not None
    dq, dk, dv, dbias = gpu_backward.gradients(*upstream(*given[3:5]), *given)
    assert dq[given[4].isneginf()].eq(0).all()
    assert given[4].isneginf().any()
    for grad in (dk, dv):
        assert grad.transpose(1, 2)[~mask].eq(0).all()
        assert grad.transpose(1, 2).is_contiguous()
    assert dbias is not None
    assert dbias.transpose(1, 2)[~mask].eq(0).all()
