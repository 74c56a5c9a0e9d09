"""Graphs as Python files and as artifacts of a trace, before and after each pass.

    MOONFX_DUMP=dir     dir/00_graph/01_canonicalize_before.py, 01_canonicalize_after.py, and
                        01_canonicalize.diff, what is different between the two; 02_...
    TORCH_TRACE=dir     the same texts as artifacts, which tlparse shows

Each file is Python that parses, with the shapes and dtypes of the graph's values as annotations,
under a comment that lists the attentions as they stand. The .diff of a pass that changed neither
says so.
"""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import fx

from moonfx.capture.trace_log import readable, trace_artifact, tracing
from moonfx.environment import dump_folder
from moonfx.report.attention import row_of
from moonfx.site import AttentionSite


class Dump:
    """Where the passes over one graph leave its texts; does nothing unless someone asked for it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        folder = dump_folder()
        self.folder = _next_folder(folder) if folder else None
        self._before = ""

    def before(self, name: str, sites: Iterable[AttentionSite]) -> None:
        """Leaves the graph as it is when the pass of this name is given it."""
        if self.folder is not None or tracing():
            self._before = self._text(name, sites)
            self._write(f"{name}_before", ".py", self._before)

    def after(self, name: str, sites: Iterable[AttentionSite]) -> None:
        """Leaves the graph as the pass made it, and what is different since `before`."""
        if self.folder is not None or tracing():
            text = self._text(name, sites)
            self._write(f"{name}_after", ".py", text)
            self._write(name, ".diff", _diff(name, self._before, text))

    def _text(self, name: str, sites: Iterable[AttentionSite]) -> str:
        return f"{''.join(_header(name, sites))}\n{readable(self.gm)}\n"

    def _write(self, name: str, kind: str, text: str) -> None:
        if self.folder is not None:
            (self.folder / f"{name}{kind}").write_text(text)
        trace_artifact(f"moonfx_{name}{kind.removesuffix('.py').replace('.', '_')}", text)


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


def _diff(name: str, before: str, after: str) -> str:
    """The unified diff of a pass, under a line with its name."""
    if before == after:
        return f"# {name}: nothing is different\n"
    files = f"{name}_before.py", f"{name}_after.py"
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    return "".join([f"# {name}\n", *difflib.unified_diff(old, new, *files)])
