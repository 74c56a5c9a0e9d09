"""A pass that fails in a test raises, instead of leaving the graph as it was."""

import pytest


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONFX_VERIFY", "1")
