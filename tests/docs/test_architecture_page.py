"""The worked example of docs/architecture.md is what its command writes."""

import importlib.util
import re
import types
from pathlib import Path

import pytest

from moonfx.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def program() -> types.ModuleType:
    pytest.importorskip("transformers")
    path = ROOT / "examples" / "llama_attention.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_worked_example_is_what_its_command_writes(program: types.ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if library.library()[1] is not None:
        pytest.skip("the page shows the kernel in C++, and there is no compiler here")
    if program.versions() not in page:
        pytest.skip(f"nodes have other names with {program.versions()}")
    assert program.placed(page, program.worked_example()) == page


def test_whatever_the_versions_one_operator_takes_the_place_of_attention_and_mask(
    program: types.ModuleType,
) -> None:
    road = program.followed()
    before, after = program.lines_of(road.before), program.lines_of(road.after)
    gone = [line for name, line in before.items() if name not in after]
    new = [line for name, line in after.items() if name not in before]
    assert sum("aten.softmax" in line for line in gone) == 1
    assert sum("aten.matmul" in line for line in gone) == 2
    assert len(new) == 2
    assert "torch.ops.moonfx.moba_attention.default" in new[0]
    assert road.mask[-1].startswith("site.mask = Mask(kind='causal', padding=None")
    assert any(re.match(r"kernels/.*: forward$", called) for called in road.called)


def test_the_command_rewrites_its_part_of_a_page_alone(
    program: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "worked_example", lambda: "new")
    start, end = program.COMMENTS
    page = tmp_path / "page.md"
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    for _ in range(2):
        program.main(["--into", str(page)])
        assert page.read_text() == f"before\n{start}\n\nnew\n\n{end}\nafter\n"
    page.write_text("no comments")
    with pytest.raises(ValueError, match="must have"):
        program.main(["--into", str(page)])
