"""What the tests of routing kernels share: a chosen launch, and the reference's choice."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import configs as gpu_configs
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu import route_by_sort as gpu_route_by_sort
from moonfx.kernels.gpu.problem import Layout, layout
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case

ROADS = ("a program for all blocks", "blocks split over programs", "more than a table holds")


def take(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the launcher choose one of ROADS whatever the shapes are, with small tiles."""
    config = gpu_configs.Config(64, 16, 4, 1)
    monkeypatch.setattr(gpu_configs, "choose", lambda *_, **__: config)
    monkeypatch.setattr(gpu_route, "PROGRAMS", 1 << 20 if road == ROADS[1] else 1)
    monkeypatch.setattr(gpu_route, "LEAST", 1)
    if road == ROADS[2]:
        monkeypatch.setattr(gpu_route, "MOST", 0)
        monkeypatch.setattr(gpu_route_by_sort, "SCRATCH", 1 << 16)


def routed(inputs: tuple[Tensor, ...], arguments: MobaArguments) -> tuple[Tensor, Layout]:
    query, key = inputs[:2]
    of = layout(query, key, arguments)
    scale = arguments.scale_for(query.shape[3])
    means = arguments.block_means if gpu_route.gated(of) else None
    if means is None and gpu_route.gated(of):
        means = gpu_means.block_means(key, of)
    bias = arguments.key_bias
    if bias is not None:
        bias = gpu_means.bias_means(bias, of, query.shape[1])
    return gpu_route.route(query, means, bias, of, scale), of


def expected(inputs: tuple[Tensor, ...], arguments: MobaArguments, of: Layout) -> Tensor:
    """The reference's choice in the order that is promised: own, then ascending, then -1."""
    query, key = inputs[:2]
    batch, heads, queries, _ = query.shape
    routes = torch.full((batch, heads, queries, of.topk), -1)
    length = key.shape[2]
    segments = arguments.segments
    if segments is None:
        segments = torch.zeros(batch, length, dtype=torch.int64)
    own = torch.full((batch, queries), -1)
    last, first = own.clone(), own.clone()
    for row in range(batch):
        index = torch.arange(queries) if of.queries.index is None else of.queries.index[row].long()
        own[row, index] = of.queries.own[row].long()
        last[row, index] = of.queries.last[row].long()
        first[row, index] = of.queries.first[row].long()
    for sequence in segments.unique():
        mask = segments.eq(sequence)
        if arguments.key_mask is not None:
            mask &= arguments.key_mask
        chosen = reference.select_blocks(
            query,
            key,
            arguments._replace(block=of.block, topk=of.topk, sinks=of.sinks, key_mask=mask),
        )
        for b, q in segments[:, length - queries :].eq(sequence).nonzero().tolist():
            for h in range(heads):
                blocks = (chosen[b, h, q].nonzero()[:, 0] + first[b, q]).tolist()
                mine = int(own[b, q])
                if mine < 0:
                    assert not blocks
                    continue
                blocks = [mine, *(x for x in blocks if x != mine)]
                routes[b, h, q, : len(blocks)] = torch.tensor(blocks)
    if of.queries.index is not None:
        index = of.queries.index[:, None, :, None].long()
        routes = routes.gather(2, index.expand_as(routes))
    return routes.unflatten(1, (key.shape[1], of.group)).transpose(2, 3).flatten(2, 3)


def assert_as_reference(case: Case) -> None:
    inputs, arguments = case.inputs(), case.arguments()
    got, of = routed(inputs, arguments)
    assert got.dtype == torch.int32
    assert got.shape == (case.batch, case.kv_heads, case.queries * case.group, of.topk)
    torch.testing.assert_close(got.long(), expected(inputs, arguments, of), rtol=0, atol=0)


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


def random_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Layout]:
    """Off the grid: scores are rounded, and another order of summation shows."""
    query, key = torch.randn(1, 4, 30, 64), torch.randn(1, 2, 600, 64)
    query, key = query.to(dtype), key.to(dtype)
    return query, key, layout(query, key, MobaArguments(8, 9, 1))
