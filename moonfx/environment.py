"""The environment variables that moonfx reads, one function each.

Kernels import nothing of moonfx and read their own where they use them: MOONFX_CACHE_DIR,
MOONFX_AUTOTUNE, XDG_CACHE_HOME, CXX, TRITON_INTERPRET. docs/debugging.md has what a user may set.
"""

import os
from pathlib import Path


def verifying() -> bool:
    """MOONFX_VERIFY: each graph is checked after each pass, and a pass that fails raises."""
    return bool(os.environ.get("MOONFX_VERIFY"))


def dump_folder() -> Path | None:
    """MOONFX_DUMP: where each graph is written before and after each pass, None for nowhere."""
    folder = os.environ.get("MOONFX_DUMP")
    return Path(folder) if folder else None


def compiler() -> str:
    """CXX: the C++ compiler that the user asks for, "" for none."""
    return os.environ.get("CXX", "")


def cache_home() -> Path:
    """XDG_CACHE_HOME, or ~/.cache: where files are kept that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
