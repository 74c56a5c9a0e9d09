"""Every front end, one road: the same attentions are found, and the same numbers computed."""

import pytest
import torch
from torch import Tensor, fx

import moonfx
from moonfx import LayerPolicy
from moonfx.report.report import Report
from tests.support.front_ends import (
    EAGER,
    Attend,
    by_einsum,
    by_matmul,
    by_module,
    by_sdpa,
    exported,
    inputs,
    model_of,
)

MODELS = [("nanoGPT", by_matmul), ("llama", by_sdpa), ("einsum", by_einsum)]
IDS = [name for name, _ in MODELS]


def by_program(attend: Attend) -> tuple[Tensor, Report]:
    program = moonfx.sparsify(exported(attend), 8, 3)
    return program.module()(*inputs()), moonfx.report(program)


def by_strict_program(attend: Attend) -> tuple[Tensor, Report]:
    program = moonfx.sparsify(exported(attend, strict=True), 8, 3)
    return program.module()(*inputs()), moonfx.report(program)


def by_graph_module(attend: Attend) -> tuple[Tensor, Report]:
    sparse = moonfx.sparsify(fx.symbolic_trace(model_of(attend)), 8, 3, **EAGER)
    return sparse(*inputs()), moonfx.report(sparse)


def by_unlifted_program(attend: Attend) -> tuple[Tensor, Report]:
    sparse = moonfx.sparsify(exported(attend).module(), 8, 3, **EAGER)
    return sparse(*inputs()), moonfx.report(sparse)


def by_compile(attend: Attend) -> tuple[Tensor, Report]:
    model = model_of(attend)
    options = {"block": 8, "topk": 3, **EAGER}
    out = torch.compile(model, backend="moonfx", options=options)(*inputs())  # type: ignore[arg-type]
    return out, moonfx.report(model)


def sites(report: Report) -> list[tuple[object, ...]]:
    """What every front end must agree on; without the model, a layer's place in it is unknown."""
    assert report.failures == []
    return [
        (r.layer, r.form, r.mask, r.action, r.policy, r.heads, r.kv_heads, r.head_dim)
        for r in report.rows
    ]


@pytest.mark.parametrize("attend", [a for _, a in MODELS], ids=IDS)
def test_every_front_end_finds_the_same_attentions_and_computes_the_same(attend) -> None:
    dense = model_of(attend)(*inputs())
    expected, report = by_module(attend)
    assert [r.layer for r in report.rows] == [f"layers.{i}" for i in range(2)]
    assert {r.action for r in report.rows} == {"sparse"}
    real = inputs()[1] == 1
    assert (expected - dense)[real].abs().max() > 1e-3
    ways = (by_program, by_strict_program, by_graph_module, by_unlifted_program, by_compile)
    for way in ways if attend is by_matmul else ways[::2]:
        found, its = way(attend)
        assert sites(its) == sites(report), way.__name__
        # The same operators in the same order: equal but for how a product is laid out.
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5, msg=way.__name__)


@pytest.mark.parametrize("front", ["program", "graph module"])
def test_every_front_end_honours_the_policy_of_each_layer(front: str) -> None:
    policy = {"layers": {"layers.1": None, "re:0$": LayerPolicy(4, 5)}, "dense_last": 1}
    if front == "program":
        program = exported(by_matmul, layers=3)
        report = moonfx.report(moonfx.sparsify(program, 8, 3, **policy))
        assert moonfx.explain(program, block=8, topk=3, **policy).rows == report.rows
    else:
        gm = fx.symbolic_trace(model_of(by_matmul, layers=3))
        sparse = moonfx.sparsify(gm, 8, 3, **policy, **EAGER)
        sparse(*inputs())
        report = moonfx.report(sparse)
        assert moonfx.explain(gm, *inputs(), block=8, topk=3, **policy).rows == report.rows
    assert [str(r.policy or r.reason) for r in report.rows] == [
        "4/5/1",
        "kept dense by the policy",
        "one of the last 1 (dense_last)",
    ]
