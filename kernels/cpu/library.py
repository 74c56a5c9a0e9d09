"""Compiles the CPU kernel on first use and keeps the library in a per-user cache.

    library()      (ctypes.CDLL, None), or (None, why there is none and what to do about it)
    available()    that reason alone, None if the kernels run here
    load()         the library, or an error

The file's name is a hash of all that decides its content: sources, flags, the compiler's version
and the processor's features. So neither an upgrade nor another machine with the same home directory
loads a stale library. Two processes that build at once each write a file of their own and then
rename it to that name.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MAIN = "main.cpp"
# Not -ffast-math: -inf marks what is masked, and a NaN must come through.
FLAGS = [
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
# Tried in this order. Without -march=native vectors are short; without OpenMP each call starts its
# threads anew.
EXTRAS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-fopenmp",),
    (),
)
RETURN_INT64 = (
    "moonfx_forward",
    "moonfx_backward",
    "moonfx_bfloat16",
    "moonfx_newton_schulz",
)
TIMEOUT = 300.0  # seconds for one run of the compiler


class BuildError(Exception):
    """Why there is no library, and the remedy."""


def cache_directory() -> Path:
    """$MOONFX_CACHE_DIR, else $XDG_CACHE_HOME/moonfx, else ~/.cache/moonfx."""
    if chosen := os.environ.get("MOONFX_CACHE_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moonfx"
    return Path(os.path.expanduser("~")) / ".cache" / "moonfx"


def find_compiler() -> list[str]:
    """$CXX, which may carry arguments, else the first of g++, c++ and clang++ on the path."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    found = f"CXX={shlex.join(asked)} is no program" if asked else "no g++, c++ or clang++ on PATH"
    raise BuildError(
        f"no C++ compiler found ({found}): install g++ (apt-get install g++), or set CXX to a "
        "C++17 compiler"
    )


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    decisive = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(decisive)}))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{error}: set CXX to another C++17 compiler") from error


def build() -> Path:
    """The path of the library, compiled if it is not there yet.

    Raises:
        BuildError: if there is no compiler or it fails; the message holds the compiler's own.
        OSError: if the cache cannot be written.
    """
    compiler, directory, here = find_compiler(), cache_directory(), Path(__file__).parent
    parts = [path.read_text() for path in sorted(here.glob("*.h")) + [here / MAIN]]
    version = run([*compiler, "--version"]).stdout
    parts += [*compiler, version, *FLAGS, repr(EXTRAS), platform.machine(), processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = directory / f"cpu-{name}.so"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    sys.stderr.write(f"moonfx: compiling its CPU kernel with {compiler[0]}, once, into {path}\n")
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=".building-", dir=directory)
    os.close(handle)
    try:
        for extra in EXTRAS:
            result = run([*compiler, *FLAGS, *extra, str(here / MAIN), "-o", temporary])
            if result.returncode == 0:
                os.replace(temporary, path)
                return path
    finally:
        Path(temporary).unlink(missing_ok=True)
    raise BuildError(
        f"{shlex.join(compiler)} did not compile the CPU kernel: set CXX to another C++17 compiler "
        f"(g++ 9 or clang 10, or later). It said: {result.stderr.strip()[-2000:]}"
    )


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded kernel, or the reason why there is none; decided once per process."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, (
            f"the CPU kernel cannot be written to or loaded from {cache_directory()} ({error}): "
            "set MOONFX_CACHE_DIR to a folder where files can be written and run"
        )
    for name in RETURN_INT64:
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded, None


def available() -> str | None:
    """Why the kernels do not run here, and the remedy; None if they do: compiled now if need be."""
    return library()[1]


def load() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: if there is none.
    """
    loaded, reason = library()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def compute_dtype(loaded: ctypes.CDLL, dtype: torch.dtype) -> torch.dtype:
    """What the library multiplies for tensors of `dtype`."""
    native = dtype == torch.bfloat16 and loaded.moonfx_bfloat16()
    return torch.bfloat16 if native else torch.float32
