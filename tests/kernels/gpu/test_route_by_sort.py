"""Routes of more blocks than a table holds, by torch operations, against the reference."""

import pytest
import torch
from hypothesis import given, settings

from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu import route_by_sort as gpu_route_by_sort
from tests.support.moba_cases import FEATURES, Case, feature_cases
from tests.support.routes import MANY, ROADS, assert_as_reference, random_call, take


@pytest.fixture(autouse=True)
def by_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    take(ROADS[2], monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_routes_as_the_reference(case: Case) -> None:
    assert_as_reference(case)


@pytest.mark.parametrize("case", [case for _, case in MANY], ids=[name for name, _ in MANY])
def test_many_blocks_route_as_the_reference(case: Case) -> None:
    assert_as_reference(case)


def test_routes_equal_the_reference() -> None:
    @settings(max_examples=100)
    @given(feature_cases())
    def check(case: Case) -> None:
        assert_as_reference(case)

    check()


def test_rows_that_are_sorted_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, of = random_call(torch.float32)
    means = gpu_means.block_means(key, of)
    found = []
    for scratch in (1, 1 << 30):
        monkeypatch.setattr(gpu_route_by_sort, "SCRATCH", scratch)
        found.append(gpu_route_by_sort.route(query, means, None, of))
    assert torch.equal(*found)


def test_it_is_taken_where_more_blocks_are_chosen_than_a_table_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, of = random_call(torch.float32)
    means, calls = gpu_means.block_means(key, of), []
    monkeypatch.setattr(gpu_route_by_sort, "route", lambda *given: calls.append(given))
    gpu_route.route(query, means, None, of, 1.0)
    monkeypatch.setattr(gpu_route, "MOST", gpu_route.gated(of))
    gpu_route.route(query, means, None, of, 1.0)
    assert len(calls) == 1
