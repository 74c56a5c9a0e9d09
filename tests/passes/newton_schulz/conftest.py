"""What the tests of Newton-Schulz iterations share."""

import pytest

from tests.support.newton_schulz.cases import always


@pytest.fixture
def operator_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration that is proved is rewritten, whatever the cost model would say here."""
    always(monkeypatch)
