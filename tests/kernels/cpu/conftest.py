"""Threads and builds that a test may change."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moonfx.kernels.cpu import library as cpu_build


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test choose the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no memory of the library that this process has loaded."""
    monkeypatch.setenv("MOONFX_CACHE_DIR", str(tmp_path / "cache"))
    cpu_build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu_build.library.cache_clear()
