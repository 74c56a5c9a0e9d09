"""Writes a model so that its path holds the old file or the whole new one, never a part.

    model.onnx                     always
    model.onnx.3f9a61c2.data       the weights, where they are too many for one protobuf (2 GiB)

Everything is written to a hidden folder beside the target and moved at the end, the model last: it
names its weights by a name that no other model has, so a crash between the moves changes nothing.
"""

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Bytes of weights up to which they lie in the model's own file.
EMBED_LIMIT = 1_800_000_000


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A folder on the target's file system that is gone at the end, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(model: Any, staged: Path) -> None:
    """Writes an onnx_ir model, its weights beside it if they are many."""
    import onnx_ir

    weights = (v.const_value for v in model.graph.initializers.values())
    large = sum(w.nbytes for w in weights if w is not None) > EMBED_LIMIT
    data = f"{staged.name}.{secrets.token_hex(4)}.data" if large else None
    onnx_ir.save(model, staged, external_data=data)


def publish(staged: Path, path: Path) -> list[str]:
    """Moves what was written to its place, and removes weights that only the old file named.

    Returns:
        The paths, the model's first.
    """
    stale = _data_of(path)
    moved: list[Path] = []
    try:
        for file in sorted(f for f in staged.parent.iterdir() if f != staged):
            moved.append(path.with_name(file.name))
            os.replace(file, moved[-1])
        os.replace(staged, path)
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
    for file in stale - set(moved):
        file.unlink(missing_ok=True)
    return [str(path), *map(str, moved)]


def _data_of(path: Path) -> set[Path]:
    """Files of weights of this module's making that the model at this path names."""
    import onnx

    own = {p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*.data")}
    if not own:
        return set()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 (not a model, or none: then nothing is known to be stale)
        return set()
    tensors = model.graph.initializer
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    named = {entry.value for entry in entries if entry.key == "location"}
    return {path.with_name(name) for name in named & own}
