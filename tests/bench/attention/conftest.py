"""What the tests of `moonfx bench attention` share."""

import pytest

from moonfx.bench.attention import main as attention
from tests.support.bench_cases import SLOW


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    """Ceilings take a second to measure; one test does."""
    monkeypatch.setattr(attention.ceilings, "measure", lambda device, dtypes: SLOW)
