"""moonfx's sources and policies in Inductor's cache keys."""

import functools
import hashlib
import importlib.util
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass


@functools.cache
def source_hash() -> str:
    """Hash of every source of moonfx, its passes and its kernels."""
    package = Path(__file__).resolve().parents[1]
    # Folders of the package once installed; in a bare checkout they lie beside it.
    parts = (importlib.util.find_spec(f"moonfx.{name}") for name in ("passes", "kernels"))
    found = [path for part in parts if part for path in part.submodule_search_locations or ()]
    roots = {package, *map(Path, found)}
    digest = hashlib.sha256()
    for root in sorted(roots):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")):
            digest.update(str(path.relative_to(root.parent)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Stamp(CustomGraphPass):
    """A pass that does nothing and puts moonfx's sources and policy into Inductor's cache keys.

    Inductor and AOTAutograd hash the graph, not the formula of a custom operator, so without
    it an edited gradient would be answered by the old artifact (pytorch#144344).
    """

    def __init__(self, policy: str) -> None:
        self.key = f"moonfx-{source_hash()}-{policy}"

    def __call__(self, graph: fx.Graph) -> None:
        return None

    def uuid(self) -> str:
        return self.key
