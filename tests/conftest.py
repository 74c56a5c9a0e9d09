"""What every test shares: a seed, few threads, a clean compiler, honest GPU skips."""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run under Triton's interpreter, which must be asked for before
# triton is imported: their tests then check numerics and indexing on any machine.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomised: the same commit gives the same verdict. No deadline: a first call may compile.
hypothesis.settings.register_profile(
    "moonfx",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("moonfx")

# More threads than cores only add noise, and the rounding of a sum must not depend on the machine.
if "OMP_NUM_THREADS" not in os.environ:
    _workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _workers)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a gpu test, with the reason, where there is no CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Seeds torch before each test and forgets what it compiled after it.

    Products in float32 stay exact: torchao lowers their precision for the whole process.
    """
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    # A test that never compiled has not imported Dynamo, and need not pay for it.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
