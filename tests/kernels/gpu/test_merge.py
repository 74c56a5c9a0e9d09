"""Partial results of a row become one softmax, in the order of the routes."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu.merge import merge
from moonfx.kernels.gpu.problem import layout


def parts(rows: int, topk: int, absent: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Results [1, rows, K, 5], logsumexps, and routes without those that are absent."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(1, rows, topk, 5, generator=generator)
    lse = torch.randn(1, rows, topk, generator=generator) * 3
    routes = torch.arange(topk, dtype=torch.int32).expand(1, 1, rows, topk).contiguous()
    for row, column in absent:
        routes[0, 0, row, column] = -1
        part[0, row, column], lse[0, row, column] = torch.nan, torch.nan  # never read
    return part, lse, routes


def merged(part: Tensor, part_lse: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
    rows, topk, dim = part.shape[1:]
    query, key = torch.zeros(1, 1, rows, 8), torch.zeros(1, 1, 64, 8)
    of = layout(query, key, MobaArguments(8, topk))
    out, lse = torch.full((1, 1, rows, dim), 7.0), torch.full((1, 1, rows), 7.0)
    merge(part, part_lse, routes, of, 0, 0, out, lse)
    return out[0, 0], lse[0, 0]


def test_a_row_is_the_softmax_over_all_of_its_routes() -> None:
    absent = [(3, 1), (3, 2), (4, 2), (6, 0), (6, 1), (6, 2)]
    part, part_lse, routes = parts(7, 3, absent)
    out, lse = merged(part, part_lse, routes)
    weight = part_lse[0].masked_fill(routes[0, 0] < 0, -torch.inf)
    share = weight.softmax(-1).nan_to_num(0.0)
    expected = (share[..., None] * part[0].nan_to_num(0.0)).sum(1)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, weight.logsumexp(-1), atol=1e-6, rtol=1e-6)


def test_a_row_without_a_route_gives_zero_and_minus_infinity() -> None:
    out, lse = merged(*parts(2, 2, [(1, 0), (1, 1)]))
    assert out[1].eq(0).all()
    assert lse[1].isneginf()
    assert lse[0].isfinite()


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_logsumexps_of_any_size_are_merged(size: float) -> None:
    part, part_lse, routes = parts(3, 2, [])
    out, lse = merged(part, part_lse, routes)
    far, far_lse = merged(part, part_lse + size, routes)
    torch.testing.assert_close(far, out, atol=2e-3, rtol=1e-3)  # 1e4 has steps of 2**-10
    torch.testing.assert_close(far_lse, lse + size, atol=2e-3, rtol=0)


def test_only_the_rows_of_a_pass_are_written() -> None:
    part, part_lse, routes = parts(8, 2, [])
    of = layout(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 64, 8), MobaArguments(8, 2))
    out, lse = torch.full((1, 1, 8, 5), 7.0), torch.full((1, 1, 8), 7.0)
    merge(part[:, 2:5], part_lse[:, 2:5].contiguous(), routes, of, 0, 2, out, lse)
    whole, _ = merged(part, part_lse, routes)
    torch.testing.assert_close(out[0, 0, 2:5], whole[2:5], atol=0, rtol=0)
    assert out[0, 0, :2].eq(7).all()
    assert lse[0, 0, 5:].eq(7).all()
