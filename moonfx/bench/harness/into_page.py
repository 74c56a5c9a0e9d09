"""Tables in a page that come from committed data: between two comments, both name the data.

<!-- docs/benchmarks/cpu.json -->
... what `moonfx bench attention --from docs/benchmarks/cpu.json --markdown` prints ...
<!-- /docs/benchmarks/cpu.json -->
"""

import argparse
from pathlib import Path

PAGE = "docs/benchmarks.md"


def add(parser: argparse.ArgumentParser) -> None:
    """`--from`, `--markdown` and `--into`: what a table is made of, and where it goes."""
    parser.add_argument(
        "--from",
        dest="read",
        nargs="+",
        metavar="JSON",
        help="measure nothing: read what --json wrote",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of a page")
    parser.add_argument(
        "--into",
        nargs="?",
        const=PAGE,
        metavar="FILE",
        help=f"put that table of --from into FILE, between its comments (FILE: {PAGE})",
    )


def place(path: Path, data: str, text: str) -> None:
    """Puts `text` between the comments for the file `data`.

    Raises:
        ValueError: if the page does not have both, once.
    """
    page = path.read_text(encoding="utf-8")
    before, after = split(page, data)
    path.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def between(page: str, data: str) -> str:
    """What stands between the comments for the file `data`."""
    before, after = split(page, data)
    return page[len(before) : len(page) - len(after)].strip("\n")


def split(page: str, data: str) -> tuple[str, str]:
    """Up to the first comment and from the second, both included."""
    start, end = f"<!-- {data} -->", f"<!-- /{data} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have {start} and {end} once each")
    before, _, rest = page.partition(start)
    return before + start, end + rest.partition(end)[2]
