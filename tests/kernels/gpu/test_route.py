"""The routing kernels, under Triton's interpreter, against the reference's chosen blocks."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu.problem import Layout, layout
from tests.support.moba_cases import FEATURES, Case, feature_cases
from tests.support.routes import ROADS, assert_as_reference, take


# The interpreter is slow: the road of torch operations is left to `make sweep`, but for few tests.
@pytest.mark.parametrize("road", [ROADS[0], pytest.param(ROADS[2], marks=pytest.mark.sweep)])
@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_routes_as_the_reference(
    case: Case, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(road, monkeypatch)
    assert_as_reference(case)


# More blocks than a tile has, so that there is something to split.
LONG = Case(batch=1, block=2, length=150, queries=30, topk=7, sinks=1)
MANY = [
    ("causal", LONG),
    ("all queries", LONG.but(queries=150, kv_heads=1, group=1)),
    ("a query", LONG.but(batch=2, queries=1, group=4)),
    ("a query, a block", LONG.but(queries=1, topk=2)),
    ("bfloat16", LONG.but(dtype=torch.bfloat16)),
    ("float16", LONG.but(dtype=torch.float16)),
    ("head dim not a power of two", LONG.but(dim=12)),
    ("bias", LONG.but(bias="all", scale=0.25)),
    ("left padding", LONG.but(batch=2, padding="left")),
    ("bidirectional", LONG.but(causal=False, queries=150, kv_heads=1, group=1)),
    ("packed", LONG.but(packing="runs", block=1)),
    ("by token", LONG.but(layout="by token")),
    ("every slot in use", LONG.but(topk=20, sinks=0, queries=10)),
]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", [case for _, case in MANY], ids=[name for name, _ in MANY])
def test_many_blocks_route_as_the_reference(
    case: Case, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(road, monkeypatch)
    assert_as_reference(case)


@pytest.mark.parametrize("road", ROADS[::2])
def test_routes_equal_the_reference(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(road, monkeypatch)

    @settings(max_examples=15 if road == ROADS[0] else 100)
    @given(feature_cases())
    def check(case: Case) -> None:
        assert_as_reference(case)

    check()


def random_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Layout]:
    """Off the grid: scores are rounded, and another order of summation shows."""
    query, key = torch.randn(1, 4, 30, 64), torch.randn(1, 2, 600, 64)
    query, key = query.to(dtype), key.to(dtype)
    return query, key, layout(query, key, MobaArguments(8, 9, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["parts", "split"])
def test_scores_are_as_exact_as_float32(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(ROADS[0], monkeypatch)
    monkeypatch.setattr(gpu_route, "REUSE", 1 if form == "parts" else 100)
    query, key, of = random_call(dtype)
    means = gpu_means.block_means(key, of)
    got = gpu_route.route(query, means, None, of, 1.0).long()
    rows = query.double().unflatten(1, (2, 2)).transpose(2, 3).flatten(2, 3)
    exact = means.double()[:, :, None].mul(rows[:, :, :, None]).sum(-1)  # [B, Hkv, R, n]
    row = torch.arange(rows.shape[2]) // of.group
    own = of.queries.own[0, row, None].long()
    block = torch.arange(of.n)
    able = (block >= 1) & (block < own)
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(-1, got.clamp(min=0), value=True)
    worst = exact.masked_fill(~(chosen & able), torch.inf).amin(-1)
    missed = exact.masked_fill(chosen | ~able, -torch.inf).amax(-1)
    # 64 products of order 1 / 2, whose sum is rounded to 2**-24 of itself some times.
    assert (missed - worst).max() < 64 * 2**-24
    assert torch.equal(chosen.sum(-1), torch.full_like(chosen.sum(-1), of.topk))


def test_routes_repeat_bit_for_bit_and_do_not_depend_on_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, of = random_call(torch.float32)
    means = gpu_means.block_means(key, of)
    runs = []
    for road in (ROADS[0], ROADS[0], ROADS[1]):
        take(road, monkeypatch)
        runs.append(gpu_route.route(query, means, None, of, 1.0))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("road", ROADS)
def test_ties_go_to_the_lower_block(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(road, monkeypatch)
    query, key = torch.ones(1, 1, 40, 4), torch.ones(1, 1, 40, 4)
    key[:, :, 24] = -0.0
    key[:, :, 25] = 0.0
    of = layout(query, key, MobaArguments(1, 4, 1))
    routes = gpu_route.route(query, gpu_means.block_means(key, of), None, of, 1.0)[0, 0]
    assert routes[39].tolist() == [39, 0, 1, 2]
    assert routes[1].tolist() == [1, 0, -1, -1]
    routes = gpu_route.route(-query, gpu_means.block_means(key, of), None, of, 1.0)[0, 0]
    assert routes[39].tolist() == [39, 0, 24, 25]
    key[:, :, 24:] = 0.0  # a tie across the parts of a split
    routes = gpu_route.route(-query, gpu_means.block_means(key, of), None, of, 1.0)[0, 0]
    assert routes[39].tolist() == [39, 0, 24, 25]


@pytest.mark.parametrize("road", ROADS)
def test_a_nan_never_comes_before_a_number(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(road, monkeypatch)
    query, key = torch.ones(1, 1, 40, 4), -torch.ones(1, 1, 40, 4)
    key[:, :, 3:8] = torch.nan
    key[:, :, 8:20] = -torch.inf
    key[:, :, 20] = 1e30
    of = layout(query, key, MobaArguments(1, 4))
    routes = gpu_route.route(query, gpu_means.block_means(key, of), None, of, 1.0)[0, 0]
    assert routes[39].tolist() == [39, 0, 1, 20]
    # What is left is chosen all the same: absent is only what is not there.
    assert routes[4].tolist() == [4, 0, 1, 2]
    assert routes[6].tolist() == [6, 0, 1, 2]
    query[:, :, 7] = torch.nan
    routes = gpu_route.route(query, gpu_means.block_means(key, of), None, of, 1.0)[0, 0]
    assert routes[7].tolist() == [7, 0, 1, 2]


@pytest.mark.parametrize(
    "arguments", [MobaArguments(8, 1), MobaArguments(8, 3, 2)], ids=["own", "own and sinks"]
)
def test_no_mean_is_read_where_nothing_is_chosen(arguments: MobaArguments) -> None:
    query, key = torch.randn(1, 2, 40, 4), torch.randn(1, 1, 40, 4)
    of = layout(query, key, arguments)
    assert gpu_route.gated(of) == 0
    routes = gpu_route.route(query, None, None, of, 1.0)
    fixed = [4, 0, 1][: of.topk]
    assert routes[0, 0, -1].tolist() == fixed
    assert routes[0, 0, 0].tolist() == [0, -1, -1][: of.topk]


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0)])
def test_nothing_in_gives_nothing_out(sizes: tuple[int, int]) -> None:
    query, key = torch.randn(sizes[0], 2, sizes[1], 4), torch.randn(sizes[0], 1, 80, 4)
    of = layout(query, key, MobaArguments(8, 3))
    routes = gpu_route.route(query, gpu_means.block_means(key, of), None, of, 1.0)
    assert routes.shape == (sizes[0], 1, 2 * sizes[1], 3)


def test_given_means_may_stop_at_the_last_complete_block(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 77, 8)
    of = layout(query, key, MobaArguments(4, 5, 1))
    means = gpu_means.block_means(key, of)
    for road in ROADS:
        take(road, monkeypatch)
        whole = gpu_route.route(query, means, None, of, 1.0)
        complete = means[:, :, :19]
        assert torch.equal(gpu_route.route(query, complete, None, of, 1.0), whole)
        longer = torch.nn.functional.pad(means, (0, 0, 0, 9), value=torch.nan)
        assert torch.equal(gpu_route.route(query, longer, None, of, 1.0), whole)
