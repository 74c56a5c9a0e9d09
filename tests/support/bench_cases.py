"""The benchmarks of attention on small cases: what their tests share."""

import json
from dataclasses import replace

import torch

from moonfx.bench.attention import main as attention
from moonfx.bench.attention.cases import Case
from moonfx.bench.attention.ceilings import Ceilings

SMALL = ["--length", "256", "--dim", "16", "--block", "32", "--topk", "2", "--repeats", "1"]
CPU = torch.device("cpu")
SPARSE = Case(2, 4, 2, 256, 256, 16, "float32", 32, 3, 1, "forward")
# Rates at which a million operations, bytes or exponentials take a second.
SLOW = Ceilings("cpu", {"float32": 1e6, "bfloat16": 1e6}, 1e6, 0, "made up")


def results_of(words, capsys):
    assert attention.main([*SMALL, "--json", "--device", "cpu", *words]) == 0
    return json.loads(capsys.readouterr().out)


def close(actual, expected):
    """float32 sums of 256 products in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# One policy of each kind; 100 ends inside a block.
COUNTED = [
    SPARSE,
    replace(SPARSE, length=100, queries=100, sinks=0),
    replace(SPARSE, queries=40),
    replace(SPARSE, topk=8),
    replace(SPARSE, topk=1, sinks=0),
]
