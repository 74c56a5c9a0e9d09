"""The pages say what is there: links lead somewhere, paths exist, nothing of a list is left out."""

import re
from pathlib import Path

import pytest

from moonfx.passes.pass_manager import PASSES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = ("moonfx", "passes", "kernels", "tests", "docs", "examples", ".ci")
# A path in backticks, from the repository's top: `passes/dump.py`, `moonfx/capture`.
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, TOP))})/[\w./-]*\w)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page is called, as GitHub and mkdocs call it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@each_page
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@each_page
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = PATH.findall(prose(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)(?= *[`#\n])", text)) <= targets
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        if module.split(".")[0] in TOP:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_every_page_has_a_place_on_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.name for page in PAGES if page.parent == ROOT / "docs"]
    assert [name for name in pages if f" {name}\n" not in navigation] == []


def test_the_readme_has_the_perplexities_of_the_benchmarks_page() -> None:
    name = "docs/benchmarks/perplexity.json"
    table = re.compile(f"<!-- {name} -->(.*)<!-- /{name} -->", re.S)
    pages = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
    readme, benchmarks = (table.findall(page.read_text(encoding="utf-8")) for page in pages)
    assert len(readme) == 1
    assert readme == benchmarks


def test_every_environment_variable_is_explained() -> None:
    read = re.compile(
        r"\bMOONFX_[A-Z]+(?:_[A-Z]+)*\b|(?:environ\.get|environ\.setdefault|getenv)\(\s*\"(\w+)\""
    )
    sources = (f for top in ("moonfx", "passes", "kernels") for f in (ROOT / top).rglob("*.py"))
    found = {m[1] or m[0] for f in sources for m in read.finditer(f.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    assert "MOONFX_DUMP" in found
    assert sorted(name for name in found if name not in page) == []


def test_every_pass_has_a_row_in_its_place() -> None:
    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert [row for row in rows if row in dict(PASSES)] == [name for name, _ in PASSES]
