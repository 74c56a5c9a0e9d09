"""What a benchmark must say about where it ran, and how it measures time and memory there."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moonfx.ops.dispatch import kernel_for


class Absent(Exception):
    """Why a contender cannot take part in a measurement."""


def describe(device: torch.device) -> dict[str, str]:
    """Hardware, versions, threads and kernel, by name."""
    found = {
        "hardware": hardware(device),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "kernel": kernel_for(device).__name__.rpartition(".")[0],
    }
    if device.type == "cpu":
        found["threads"] = f"{torch.get_num_threads()} on {os.cpu_count()} cores"
        busy = os.getloadavg()[0]
        if busy > 0.5:
            found["warning"] = f"load average {busy:.1f} before the start: times may be too long"
    return found


def text(where: Mapping[str, str]) -> str:
    """What `describe` found, a line each."""
    return "\n".join(f"{name}: {words}" for name, words in where.items())


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): words.strip() for name, words in fields.items()}
    decisive = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    vectors = [f for f in decisive if f in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(vectors)})"


SHORT = 0.02  # seconds: a shorter call is repeated for so long, and its mean counts


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    spent = times(call, device, 1)
    repeats = int(SHORT / max(spent, 1e-6))
    return spent if repeats < 2 else min(spent, times(call, device, repeats) / repeats)


def times(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Wall time of so many calls; the device is waited for once."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a call above what is in use before it: results, saved tensors and scratch.

    On a GPU the allocator's count. On a CPU the process's resident memory, which Linux keeps a
    high-water mark of and lets us reset; None where it cannot be had.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Memory that the C library keeps for itself would be used again and not be seen.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        result = call()
        peak = status_bytes("VmHWM") - before
        del result
    except (OSError, AttributeError, KeyError):
        return None
    return peak


def status_bytes(field: str) -> int:
    """One of the kilobyte counts of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had; a terabyte where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps for itself is free as well
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 40
    found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
