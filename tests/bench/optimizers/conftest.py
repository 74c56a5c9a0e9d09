"""What the tests of `moonfx bench optimizer` and `newton-schulz` share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moonfx.backend import entry
from moonfx.bench.harness.machine import Absent
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers import step_contenders
from moonfx.bench.optimizers.matrices import MODELS


def nothing(module: str, package: str) -> Any:
    raise Absent("not installed")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No package of others, whatever is installed, and as many threads afterwards as before."""
    monkeypatch.setattr(others, "imported", nothing)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that cost no compilation: Inductor would take a minute."""
    monkeypatch.setitem(entry.DEFAULTS, "compiler", "eager")
    monkeypatch.setitem(MODELS, "tiny", {(8, 16): 1, (16, 8): 1})
    monkeypatch.setattr(step_contenders, "VOCABULARY", 16)
    monkeypatch.setattr(step_contenders, "GAINS", 2)
    monkeypatch.setattr(step_contenders, "BACKENDS", {"inductor": "eager", "moonfx": "moonfx"})
    monkeypatch.setattr(step_contenders, "ready", lambda device, names: None)
