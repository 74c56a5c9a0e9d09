"""Tests mirror the folders: each module with behaviour of its own has a test file of its name.

passes/masks/prove.py           tests/passes/masks/test_prove.py
kernels/cpu/moba.py             tests/kernels/cpu/test_moba.py
moonfx/capture/sizes.py         tests/capture/test_sizes.py
moonfx/modules.py               tests/frontends/test_modules.py, as all that lies loose in moonfx
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIRRORED = (
    "passes",
    "kernels",
    *(f"moonfx/{name}" for name in ("capture", "backend", "report", "ops", "optim", "onnx")),
)

# module -> why no test has its name.
EXEMPT = {
    "moonfx/__main__.py": "starts the command; tests/cli/test_cli.py runs it",
    "kernels/gpu/moba.py": "starts the kernels; test_forward.py, test_decode.py and test_device.py",
    "passes/newton_schulz/chain.py": "two records of what test_iterations.py reads into them",
    "moonfx/environment.py": "tests/test_environment.py, which looks at every other file as well",
}


def modules() -> list[Path]:
    """What must have a test, relative to the root; __init__.py says what a folder is for."""
    found = [path for folder in MIRRORED for path in (ROOT / folder).rglob("*.py")]
    found += (ROOT / "moonfx").glob("*.py")
    return sorted(p.relative_to(ROOT) for p in found if p.name != "__init__.py")


def test_of(module: Path) -> Path:
    """Where the test of a module is."""
    folder = module.parent
    if folder.parts[0] == "moonfx":
        folder = folder.relative_to("moonfx") if len(folder.parts) > 1 else Path("frontends")
    return Path("tests", folder, f"test_{module.name}")


test_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", [*MIRRORED, "moonfx"])
def test_each_module_has_a_test_of_its_name(folder: str) -> None:
    inside = [m for m in modules() if m.is_relative_to(folder)]
    assert len(inside) > 2
    without = {str(m) for m in inside if not (ROOT / test_of(m)).exists()}
    assert without - EXEMPT.keys() == set()


def test_what_is_left_out_is_there_and_has_no_test() -> None:
    assert EXEMPT.keys() <= {str(m) for m in modules()}
    tested = {name for name in EXEMPT if (ROOT / test_of(Path(name))).exists()}
    assert tested == set(), "it needs no entry any more"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("passes/masks/prove.py", "tests/passes/masks/test_prove.py"),
        ("kernels/cpu/moba.py", "tests/kernels/cpu/test_moba.py"),
        ("moonfx/optim/state/floats.py", "tests/optim/state/test_floats.py"),
        ("moonfx/modules.py", "tests/frontends/test_modules.py"),
    ],
)
def test_a_test_lies_where_its_module_does(module: str, expected: str) -> None:
    assert test_of(Path(module)) == Path(expected)
