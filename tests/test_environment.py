"""moonfx reads the environment in one file, and the kernels where they use it."""

import ast
from pathlib import Path

import pytest

import moonfx
import moonfx.passes
from moonfx import environment

PACKAGE = Path(moonfx.__file__).parent
SOURCES = [*PACKAGE.rglob("*.py"), *Path(next(iter(moonfx.passes.__path__))).rglob("*.py")]


def reads(source: str) -> list[int]:
    """The lines that read a variable of the environment by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
        if text.startswith(("os.environ.get(", "os.environ[", "os.getenv(", "environ.get(")):
            found.append(node.lineno)
    return found


def test_no_other_file_reads_the_environment() -> None:
    others = [p for p in SOURCES if p.name != "environment.py" and "kernels" not in p.parts]
    found = {str(p): lines for p in others if (lines := reads(p.read_text()))}
    assert found == {}
    assert len(reads((PACKAGE / "environment.py").read_text())) == 4


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("1", True)])
def test_graphs_are_verified_if_asked(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOONFX_VERIFY", raising=False)
    if value is not None:
        monkeypatch.setenv("MOONFX_VERIFY", value)
    assert environment.verifying() is expected


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOONFX_DUMP", "XDG_CACHE_HOME", "CXX"):
        monkeypatch.setenv(name, "")
    assert environment.dump_folder() is None
    assert environment.cache_home() == Path.home() / ".cache"
    assert environment.compiler() == ""
    for name in ("MOONFX_DUMP", "XDG_CACHE_HOME", "CXX"):
        monkeypatch.setenv(name, "there")
    assert environment.dump_folder() == environment.cache_home() == Path("there")
    assert environment.compiler() == "there"
