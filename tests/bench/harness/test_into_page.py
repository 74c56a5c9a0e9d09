"""A table goes between the two comments that name its data, and nowhere else."""

from pathlib import Path

import pytest

from moonfx.bench.harness.into_page import between, place

PAGE = (
    "top\n<!-- a.json -->\nold\n<!-- /a.json -->\nmiddle\n<!-- b.json -->\n<!-- /b.json -->\nend\n"
)


def test_a_table_replaces_what_stood_there_and_leaves_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # again, it changes nothing
        place(page, "a.json", "| new |")
        assert page.read_text() == PAGE.replace("old", "| new |")
    assert between(page.read_text(), "a.json") == "| new |"
    assert between(page.read_text(), "b.json") == ""


@pytest.mark.parametrize(
    "page",
    [
        "no comment",
        "<!-- a.json -->",
        "<!-- /a.json -->",
        f"{PAGE}<!-- a.json -->",
    ],
)
def test_a_page_without_both_comments_once_is_an_error_and_stays(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(ValueError, match="must have <!-- a.json --> and <!-- /a.json --> once"):
        place(path, "a.json", "table")
    assert path.read_text() == page
