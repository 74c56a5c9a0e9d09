"""Graphs as Python files and as artifacts of a trace, before and after each pass.

    MOONFX_DUMP=dir     dir/00_graph/01_find_attention_before.py, 01_find_attention_after.py, ...
    TORCH_TRACE=dir     the same texts as artifacts, which tlparse shows

Each file is Python that parses, with the shapes and dtypes of the graph's values as annotations,
under a comment that lists the attentions as they stand.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import fx

from moonfx.capture.trace_log import readable, trace_artifact, tracing
from moonfx.report.attention import row_of
from moonfx.site import AttentionSite


class Dump:
    """Where the passes over one graph leave its texts; does nothing unless someone asked for it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        folder = os.environ.get("MOONFX_DUMP")
        self.folder = _next_folder(Path(folder)) if folder else None

    def write(self, name: str, sites: Iterable[AttentionSite]) -> None:
        """Leaves the graph as it is now, as `name`.py."""
        if self.folder is None and not tracing():
            return
        text = f"{''.join(_header(name, sites))}\n{readable(self.gm)}\n"
        if self.folder is not None:
            (self.folder / f"{name}.py").write_text(text)
        trace_artifact(f"moonfx_{name}", text)


def _next_folder(parent: Path) -> Path:
    """A new folder 00_graph, 01_graph, ...; several processes may dump into one parent."""
    parent.mkdir(parents=True, exist_ok=True)
    number = len(list(parent.glob("*_graph")))
    while True:
        folder = parent / f"{number:02}_graph"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _header(name: str, sites: Iterable[AttentionSite]) -> Iterator[str]:
    yield f"# {name}\n"
    for row in map(row_of, sites):
        what = f"{row.form}, mask {row.mask or 'not proved'}, {row.action}"
        detail = str(row.policy) if row.policy else " ".join(row.reason.split())
        yield f"# {row.layer} ({row.line}): {what} {detail}".rstrip() + "\n"
    yield "import torch\nfrom torch import device\n"
