"""What is predicted: expected routes and tiles, stages, ceilings."""

from dataclasses import replace

import pytest
import torch

from moonfx.bench.attention import (
    ceilings,
    contenders,
    counts,
    roofline,
)
from moonfx.bench.attention import main as attention
from moonfx.bench.attention.cases import PASSES
from moonfx.bench.attention.ceilings import Ceilings
from moonfx.bench.harness import machine
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.bench_cases import COUNTED, CPU, SLOW, SPARSE


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_expected_routes_attend_as_many_keys_as_the_formula_counts(case):
    """Own blocks hold queries up to the last token, so their keys are counted one by one."""
    counted = counts.blocks(case)
    assert counted.rows.sum() == pytest.approx(chosen_blocks(case).sum().item())
    earlier = (counted.rows - counted.own).sum().item() * case.block
    own = sum(i % case.block + 1 for i in range(case.length - case.queries, case.length))
    if case.length <= case.block * case.topk:
        return
    assert earlier + own * counts.group(case) == pytest.approx(
        case.sparse_keys * counts.group(case)
    )


def chosen_blocks(case):
    """Of one kv head, by the reference: bool [G * queries, n]; one block where it is dense."""
    if case.length <= case.block * case.topk:
        return torch.ones(counts.group(case) * case.queries, 1)
    one = replace(case, batch=1, heads=counts.group(case), kv_heads=1)
    given = contenders.inputs(one, CPU)
    return reference.select_blocks(
        given.query, given.key, MobaArguments(case.block, case.topk, sinks=case.sinks)
    ).flatten(0, 2)


def test_expected_rows_of_a_block_are_those_of_a_random_gate():
    """Means of 200 draws; the standard error of each is below 0.3 rows of 32 to 128."""
    case = replace(SPARSE, batch=200, heads=1, kv_heads=1)
    given = contenders.inputs(case, CPU)
    chosen = reference.select_blocks(given.query, given.key, MobaArguments(32, 3, sinks=1))
    drawn = chosen.sum((1, 2)).double().mean(0)
    torch.testing.assert_close(drawn, counts.blocks(case).rows, rtol=0, atol=1.5)


def test_tiles_hold_whole_blocks_only_where_their_rows_divide():
    assert counts.tile_fill(replace(SPARSE, topk=1, sinks=0), 64) == 1.0
    assert counts.tile_fill(replace(SPARSE, topk=1, sinks=0), 128) == 0.5
    assert counts.computed_pairs(replace(SPARSE, topk=1, sinks=0), 64, 32) == 256 * 32 * 8


def test_the_roofline_sums_the_larger_of_arithmetic_and_bytes_of_each_stage():
    rates = Ceilings("cuda", {"float32": 100.0}, 10.0, 5.0, "")
    assert roofline.seconds(roofline.Stage("x", "float32", 300, 10, 20), rates) == 5.0
    assert roofline.seconds(roofline.Stage("x", "float32", 300, 10, 80), rates) == 8.0
    uncounted = rates._replace(exps=0)
    assert roofline.seconds(roofline.Stage("x", "float32", 300, 10, 20), uncounted) == 3.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_prediction_is_never_faster_than_its_arithmetic_and_grows_with_backward(device):
    rates = SLOW._replace(device=device)
    for case in COUNTED:
        forward = roofline.predict(case, rates)
        both = roofline.predict(replace(case, work=PASSES[1]), rates)
        assert forward["forward"] >= case.flops / 1e6
        assert sum(both.values()) > 3 * forward["forward"]
        sparse = case.length > case.block * case.topk
        assert (forward["routing"] > 0) == sparse


def test_a_prediction_without_the_chip_is_called_one_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(machine, "seconds", lambda *_: pytest.fail("measured"))
    assert attention.main(["--predict", "h100", "--suite", "flashmoba"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTION, not a measurement: published ceilings of an H100 SXM")
    assert len([line for line in printed.splitlines() if "bfloat16" in line]) == 14


def test_the_higher_of_two_measured_rates_counts():
    other = SLOW._replace(flops={"float32": 2e6, "bfloat16": 1.0}, copy=3e6)
    found = ceilings.higher(SLOW, other)
    assert found.flops == {"float32": 2e6, "bfloat16": 1e6}
    assert found.copy == 3e6


def test_ceilings_are_rates_of_this_machine(monkeypatch):
    monkeypatch.undo()
    found = ceilings.measure(CPU, {"bfloat16"})
    assert found.flops.keys() == {"bfloat16", "float32"}
    assert all(1e8 < rate < 1e14 for rate in found.flops.values())
    assert 1e8 < found.copy < 1e13
