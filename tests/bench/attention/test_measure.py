"""How a case is measured, and who is left out of it."""

from dataclasses import replace

import pytest

from moonfx.bench.attention import (
    contenders,
    measure,
    table,
)
from moonfx.bench.attention.cases import PASSES
from moonfx.bench.attention.measure import Limits
from moonfx.bench.attention.results import Run
from moonfx.bench.harness import machine
from tests.support.bench_cases import CPU, SLOW, SPARSE

# name, the case, what of it is missing and why
ABSENT = [
    ("flex backward", replace(SPARSE, work=PASSES[1]), "flex", "has no backward on a CPU"),
    ("flex blocks", SPARSE, "flex", "tiles of 128 keys would cross blocks of 32"),
    ("reference", replace(SPARSE, length=512, queries=512), "reference", "N = 512 is over"),
    ("dense", replace(SPARSE, length=4096, queries=4096), "dense", "over --patience 1,000"),
]


@pytest.mark.parametrize(
    ("case", "name", "why"), [row[1:] for row in ABSENT], ids=[row[0] for row in ABSENT]
)
def test_a_contender_that_cannot_run_says_why_and_the_others_do(case, name, why):
    limits = Limits(1, also=("flex", "reference"), reference_up_to=256, patience=1000)
    result = measure.measure(case, CPU, SLOW, limits)
    assert why in result.absent[name]
    assert name not in result.seconds
    assert len(result.seconds["moonfx"]) == 1
    assert f"{name}: {result.absent[name]}" in table.text(Run({"hardware": "x"}, [result], []))


def test_a_long_warm_up_is_a_turn(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0.0)
    monkeypatch.setattr(machine, "SHORT", 0.0)
    calls = []
    monkeypatch.setattr(contenders, "moonfx", lambda case, given: lambda: calls.append(1))
    result = measure.measure(SPARSE, CPU, SLOW, Limits(2, patience=1e9))
    assert len(calls) == len(result.seconds["moonfx"]) == 2
