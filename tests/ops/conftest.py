"""The kernels that a CPU tensor can get."""

import warnings
from collections.abc import Iterator

import pytest

from moonfx import fallback
from moonfx.kernels.cpu import moba as cpu


@pytest.fixture(params=["C++ kernel", "torch kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test on each kernel that a CPU tensor can get."""
    if request.param == "torch kernel":
        monkeypatch.setattr(cpu, "available", lambda: "switched off by a test")
        fallback.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fallback.warn_slow("the kernel", "switched off by a test")
            yield
        fallback.forget()
    elif (reason := cpu.available()) is not None:
        pytest.skip(reason)
    else:
        yield
