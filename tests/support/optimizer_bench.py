"""The benchmarks of optimizers on tiny sizes: what their tests share."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from moonfx.bench.harness import machine
from moonfx.cli import command as cli

# Words after `moonfx bench newton-schulz` and `optimizer`: what takes no time.
SHAPES = ["--shape", "8x16", "16x8", "--count", "2", "--repeats", "2"]
QUICK = ["--model", "tiny", "--repeats", "1", "--steps", "1"]


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    """What a benchmark says in JSON."""
    assert cli.main(["bench", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def ticking(monkeypatch: pytest.MonkeyPatch, spent: Callable[[int], float]) -> None:
    """Has the i-th measured call take `spent(i)` seconds."""
    count = iter(range(10_000))
    monkeypatch.setattr(machine, "seconds", lambda call, device: spent(next(count)))
