"""Newton-Schulz and Muon of other packages, where they are installed.

gram-newton-schulz  GramNewtonSchulz, Muon: the same coefficients; float16
dion                Newton-Schulz, Muon in one process: coefficients of its own; bfloat16

Only what they publish is called. What is not installed, does not run here or has another interface
raises Absent, so that a table says why it has no figure.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moonfx.bench.harness import machine
from moonfx.bench.harness.machine import Absent
from moonfx.kernels.reference.newton_schulz import JORDAN

INSTALL = {
    "gram-newton-schulz": "pip install gram-newton-schulz",
    "dion": "pip install git+https://github.com/microsoft/dion",
}
NAMES = tuple(INSTALL)
# What they multiply in, whatever they are given.
MULTIPLIES_IN = {"gram-newton-schulz": torch.float16, "dion": torch.bfloat16}
RATES = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": True}
DION_STEPS = 5


class Iteration(NamedTuple):
    """A function of a batch of matrices, and in what it differs from ours."""

    call: Callable[[Tensor], Any]
    note: str


class Step(NamedTuple):
    """An optimizer, and in what it differs from torch.optim.Muon."""

    optimizer: torch.optim.Optimizer
    note: str


def iteration(name: str, steps: int, device: torch.device) -> Iteration:
    """Raises Absent."""
    with or_absent():
        return gram_iteration(steps, device) if name == NAMES[0] else dion_iteration(steps, device)


def muon(name: str, parameters: Sequence[nn.Parameter], steps: int, device: torch.device) -> Step:
    """Raises Absent."""
    with or_absent():
        made = gram_muon if name == NAMES[0] else dion_muon
        return made(list(parameters), steps, device)


@contextlib.contextmanager
def or_absent() -> Iterator[None]:
    """Whatever goes wrong in a package of others is a reason, not a crash; nothing is printed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Absent:
        raise
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise Absent(f"{type(error).__name__}: {message}") from error


def gram_iteration(steps: int, device: torch.device) -> Iteration:
    package = imported("gram_newton_schulz", "gram-newton-schulz")
    kernels, without = gram_kernels(device)
    made = package.GramNewtonSchulz(ns_use_kernels=kernels, ns_coefficients=[list(JORDAN)] * steps)
    return Iteration(made, f"the same coefficients, normalizes as well, float16{without}")


def gram_muon(parameters: list[nn.Parameter], steps: int, device: torch.device) -> Step:
    package = imported("gram_newton_schulz", "gram-newton-schulz")
    kernels, without = gram_kernels(device)
    made = package.Muon(
        parameters,
        **RATES,
        momentum=0.95,
        adjust_lr="rms_norm",
        ns_coefficients=[list(JORDAN)] * steps,
        ns_use_kernels=kernels,
    )
    return Step(made, f"the same coefficients, float16{without}")


def gram_kernels(device: torch.device) -> tuple[bool, str]:
    """Whether its kernels run on a device; what to say where they do not."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return True, ""
    return False, ", without its kernels, which are for GPUs of compute capability 9.0"


def dion_iteration(steps: int, device: torch.device) -> Iteration:
    package = imported("dion.newton_schulz_triton", "dion")
    check_dion_steps(steps)
    on_gpu = device.type == "cuda"
    made = package.newton_schulz_triton if on_gpu else package.zeropower_via_newtonschulz5
    without = "" if on_gpu else ", without its kernels, which are for GPUs"
    return Iteration(made, f"its own coefficients, normalizes as well, bfloat16{without}")


def dion_muon(parameters: list[nn.Parameter], steps: int, device: torch.device) -> Step:
    package = imported("dion", "dion")
    check_dion_steps(steps)
    wanted: dict[str, Any] = {
        **RATES,
        "mu": 0.95,
        "adjust_lr": "rms_norm",
        "use_triton": device.type == "cuda",
    }
    if "use_polar_express" in inspect.signature(package.Muon).parameters:
        wanted["use_polar_express"] = False
    return Step(package.Muon(parameters, **wanted), "its own coefficients, bfloat16")


def check_dion_steps(steps: int) -> None:
    if steps != DION_STEPS:
        raise Absent(f"it always takes {DION_STEPS} steps, not {steps}")


def imported(module: str, package: str) -> ModuleType:
    """A module of theirs; Absent where the package is not installed."""
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise
        raise Absent(f"not installed ({INSTALL[package]})") from error


def version(name: str) -> str:
    """The name with its version, where it has one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{name} {importlib.metadata.version(name)}"
    return name


def check_patience(name: str, flops: float, device: torch.device, patience: float) -> None:
    """Raises Absent for a call that would take longer: a CPU may have no fast float16 products."""
    dtype = MULTIPLIES_IN[name]
    rate = product_rate(device, dtype, torch.get_num_threads())
    if flops / rate > patience:
        raise Absent(
            f"a call is predicted to take over --patience {patience:g} s "
            f"({str(dtype).removeprefix('torch.')} products run at {rate / 1e9:,.1f} GFLOP/s here)"
        )


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of one product of 256 x 256 matrices on so many threads."""
    matrix = torch.ones(256, 256, device=device, dtype=dtype)
    matrix @ matrix
    start = time.perf_counter()
    matrix @ matrix
    machine.synchronize(device)
    return 2 * 256**3 / (time.perf_counter() - start)


def checked(call: Callable[[Tensor], Any], X: Tensor) -> Callable[[], Any]:
    """The call with X, once it has run (and compiled) and gave a matrix for each of X's.

    Raises Absent.
    """
    with or_absent():
        out = call(X)
        if not isinstance(out, Tensor) or out.shape != X.shape:
            raise Absent(f"it gave {getattr(out, 'shape', type(out).__name__)} for {X.shape}")
    return lambda: call(X)
