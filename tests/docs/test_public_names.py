"""Every public name has a docstring, and stands on the page of names."""

import inspect
import re
from pathlib import Path

import pytest

import moonfx

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", moonfx.__all__)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    thing = getattr(moonfx, name)
    assert (thing.__doc__ or "").strip()
    if inspect.isclass(thing):  # a dataclass without one is given its signature
        assert not thing.__doc__.startswith(f"{name}(")
        assert all(thing.__doc__ != base.__doc__ for base in thing.__mro__[1:])


def test_the_page_of_names_lists_each_public_name_once() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: moonfx\.(?:\w+\.)*(\w+)$", page, re.M)
    assert sorted(listed) == sorted(moonfx.__all__)
