"""How time and memory are measured, and what is said of the machine."""

import time

import pytest
import torch

from moonfx.bench.harness import machine
from tests.support.bench_cases import CPU


def test_a_short_call_is_repeated_and_a_long_one_is_not():
    count = []
    assert machine.seconds(lambda: count.append(1), CPU) < 1e-4
    assert len(count) > 100
    count.clear()
    assert machine.seconds(lambda: (count.append(1), time.sleep(0.021)), CPU) >= 0.021
    assert len(count) == 1


def test_peak_memory_counts_what_a_call_allocates_and_not_what_was_there():
    held = torch.ones(32 << 20, dtype=torch.uint8)
    peak = machine.peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8), torch.device("cpu"))
    assert held.numel() == 32 << 20
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert peak == pytest.approx(64 << 20, rel=0.1)


def test_a_busy_machine_is_named_before_the_numbers(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 3.0, 3.0))
    assert "load average 3.0" in machine.describe(torch.device("cpu"))["warning"]
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 3.0, 3.0))
    assert "warning" not in machine.describe(torch.device("cpu"))


def test_the_kernel_is_named_by_the_folder_that_a_user_may_look_into():
    assert machine.describe(CPU)["kernel"] in ("moonfx.kernels.cpu", "moonfx.kernels.torch_ops")
