"""Tables in a document that come from committed data: between two comments, the first names it.

<!-- docs/benchmarks/cpu.json -->
... what `moonfx bench attention --from docs/benchmarks/cpu.json --markdown` prints ...
<!-- /docs/benchmarks/cpu.json -->
"""

from pathlib import Path


def place(path: Path, data: str, text: str) -> None:
    """Puts `text` between the comments for the file `data`.

    Raises:
        ValueError: if the document does not have both, once.
    """
    document = path.read_text(encoding="utf-8")
    before, after = split(document, data)
    path.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def between(document: str, data: str) -> str:
    """What stands between the comments for the file `data`."""
    before, after = split(document, data)
    return document[len(before) : len(document) - len(after)].strip("\n")


def split(document: str, data: str) -> tuple[str, str]:
    """Up to the first comment and from the second, both included."""
    start, end = f"<!-- {data} -->", f"<!-- /{data} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"the document must have {start} and {end} once each")
    before, _, rest = document.partition(start)
    return before + start, end + rest.partition(end)[2]
