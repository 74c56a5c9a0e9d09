"""What moonfx says on request: logs through TORCH_LOGS, graphs through MOONFX_DUMP."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import moonfx
from moonfx.passes.pass_manager import PASSES
from tests.capture.test_functorch_regions import Nested
from tests.support.tiny import TinyLM, tokens

PROGRAM = """
    import torch, moonfx
    from tests.support.tiny import TinyLM, tokens
    model = TinyLM()
    model.layers[1].dropout = 0.5
    moonfx.sparsify(model, 16, 2, compiler="eager")(tokens())
"""


@pytest.mark.parametrize(
    ("setting", "said", "unsaid"),
    [
        (
            "+moonfx",
            [
                "find_attention: 1 in ",
                "layers.0 (tiny.py:23): sdpa, sparse: 16/2/1",
                "layers.1 (tiny.py:23): declined: dropout p=0.5 is active; set it to 0 or",
            ],
            [],
        ),
        ("moonfx", ["layers.0 (tiny.py:23): sdpa, sparse: 16/2/1"], ["find_attention: 1"]),
    ],
)
def test_logs_are_switched_by_torch_logs(setting: str, said: list[str], unsaid: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "TORCH_LOGS": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    for text in said:
        assert text in run.stderr
    for text in unsaid:
        assert text not in run.stderr


@pytest.mark.parametrize("kind", [TinyLM, Nested])
def test_each_pass_leaves_the_graph_before_and_after_as_python(
    kind: type[TinyLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONFX_DUMP", str(tmp_path / "new"))
    model = moonfx.sparsify(kind(), 16, 2, compiler="eager")
    model(tokens())
    model(tokens(50))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["00_graph", "01_graph"]
    folder = tmp_path / "new" / "00_graph"
    names = [
        f"{i:02}_{name}{what}"
        for i, (name, _) in enumerate(PASSES, 1)
        for what in (".diff", "_after.py", "_before.py")
    ]
    assert sorted(p.name for p in folder.iterdir()) == names
    for path in folder.glob("*.py"):
        ast.parse(path.read_text())
    before, after = (folder / n for n in ("01_canonicalize_before.py", names[-2]))
    assert "aten.scaled_dot_product_attention" in before.read_text()
    text = after.read_text()
    assert text.count("torch.ops.moonfx.moba_attention") == 2
    assert "aten.scaled_dot_product_attention" not in text
    assert "# layers.1 (tiny.py:23): sdpa, mask causal, sparse 16/2/1\n" in text


def test_the_diff_of_a_pass_makes_its_before_its_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONFX_DUMP", str(tmp_path))
    moonfx.sparsify(TinyLM(), 16, 2, compiler="eager")(tokens())
    folder = tmp_path / "00_graph"
    unchanged = []
    for number, (name, _) in enumerate(PASSES, 1):
        stem = f"{number:02}_{name}"
        before, after = ((folder / f"{stem}_{when}.py").read_text() for when in ("before", "after"))
        diff = (folder / f"{stem}.diff").read_text()
        if diff == f"# {stem}: nothing is different\n":
            assert before == after
            unchanged.append(name)
            continue
        head = f"# {stem}\n--- {stem}_before.py\n+++ {stem}_after.py\n@@ "
        assert diff.startswith(head)
        assert _patched(before, diff) == after
    assert unchanged == ["canonicalize", "lay_out_heads", "newton_schulz", "symbolic_alpha"]
    made = next(folder.glob("*_sparsify_attention.diff")).read_text().splitlines()
    lines = [x for x in made if "torch.ops.moonfx.moba_attention" in x]
    assert len(lines) == 2
    assert all(x.startswith("+") for x in lines)


def _patched(before: str, diff: str) -> str:
    """What a unified diff makes of a text; each line that it keeps or takes out must be there."""
    lines, out, at = before.splitlines(keepends=True), [], 0
    for line in diff.splitlines(keepends=True)[3:]:
        kind, rest = line[0], line[1:]
        if kind == "@":
            start = int(line.split()[1].removeprefix("-").split(",")[0]) - 1
            out += lines[at:start]
            at = start
        elif kind == "+":
            out.append(rest)
        else:
            assert lines[at] == rest
            out += [rest] if kind == " " else []
            at += 1
    return "".join(out + lines[at:])


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONFX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    moonfx.sparsify(TinyLM(), 16, 2, compiler="eager")(tokens())
    assert list(tmp_path.iterdir()) == []
