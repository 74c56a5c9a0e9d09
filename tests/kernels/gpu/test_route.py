"""The routing kernels, under Triton's interpreter, against the reference's chosen blocks."""

import pytest
import torch
from hypothesis import given, settings

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu.problem import layout
from tests.support.moba_cases import FEATURES, Case, feature_cases
from tests.support.routes import MANY, ROADS, assert_as_reference, random_call, take


@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_routes_as_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    take(ROADS[0], monkeypatch)
    assert_as_reference(case)


@pytest.mark.parametrize("road", ROADS[:2])
@pytest.mark.parametrize("case", [case for _, case in MANY], ids=[name for name, _ in MANY])
def test_many_blocks_route_as_the_reference(
    case: Case, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(road, monkeypatch)
    assert_as_reference(case)


def test_routes_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    take(ROADS[0], monkeypatch)

    @settings(max_examples=15)
    @given(feature_cases())
    def check(case: Case) -> None:
        assert_as_reference(case)

    check()


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
