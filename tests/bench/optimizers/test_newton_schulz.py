"""`moonfx bench newton-schulz`: what is measured, and what both benchmarks refuse."""

from pathlib import Path
from typing import Any

import pytest

from moonfx.bench.harness import machine
from moonfx.bench.optimizers import newton_schulz, optimizer, step_contenders
from moonfx.cli import command as cli
from tests.support.optimizer_bench import SHAPES, printed


def test_newton_schulz_measures_the_loop_and_each_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = [*SHAPES, "--dtype", "float32"]
    picture = tmp_path / "forms.png"
    results = printed(capsys, "newton-schulz", *words, "--plot", str(picture))["results"]
    assert [(r["m"], r["n"], r["count"]) for r in results] == [(8, 16, 2), (16, 8, 2)]
    for r in results:
        assert {name: len(turns) for name, turns in r["seconds"].items()} == dict.fromkeys(
            ("loop", *newton_schulz.FORMS), 2
        )
        best = {name: min(turns) for name, turns in r["seconds"].items()}
        assert r["speedup"]["gram"] == pytest.approx(best["loop"] / best["gram"])
        # Half of X X^T and of A^2: (4 e + 2) / (3 e + 1) with e = n/m = 2, less what rows of
        # so small a triangle need beyond the half.
        assert 1 < r["flop_ideal"]["symmetric"] <= 10 / 7
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "newton-schulz", *words]) == 0
    text = capsys.readouterr().out
    assert "symmetric of FLOP-ideal" in text
    assert "verdict" not in text
    assert text.count("- gram-newton-schulz is left out: not installed\n") == 1
    assert text.count("- dion is left out: not installed\n") == 1


def test_only_auto_measures_what_the_verdict_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*SHAPES, "--dtype", "float32", "--only", "auto"]
    for form, measured in ("gram", {"loop", "gram"}), ("plain", {"loop"}):
        monkeypatch.setattr(
            newton_schulz, "newton_schulz_form", lambda *size, form=form: (form, "a test")
        )
        results = printed(capsys, "newton-schulz", *given)["results"]
        assert [set(r["seconds"]) for r in results] == [measured] * 2
        assert [r["as_written"] for r in results] == [form == "plain"] * 2


WRONG: list[tuple[Any, list[str], str]] = [
    (newton_schulz, ["--shape", "8by8"], "a shape is rows x columns, as 576x1536, got '8by8'"),
    (newton_schulz, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
    (newton_schulz, ["--threads", "0"], "--threads must be at least 1, got 0"),
    (newton_schulz, ["--at-most", "0"], "--at-most must be positive, got 0"),
    (newton_schulz, ["--at-most", "nan"], "--at-most must be positive, got nan"),
    (optimizer, ["--count", "0"], "--count must be at least 1, got 0"),
    (optimizer, ["--compiles", "0"], "--compiles must be at least 1, got 0"),
    (optimizer, ["--only", "adam"], "invalid choice: 'adam'"),
    (optimizer, ["--each", "--only", "moonfx"], "--only must name both"),
    (optimizer, ["--device", "bogus"], "must be cpu, or a GPU that torch can use, got 'bogus'"),
    (newton_schulz, ["--device", "bogus"], "must be cpu, or a GPU that torch can use"),
    (newton_schulz, ["--plot", "/no/a.png"], "must be a file in a folder that exists"),
]


@pytest.mark.parametrize(("benchmark", "words", "message"), WRONG)
def test_wrong_words_are_told(
    benchmark: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(words)
    assert message in capsys.readouterr().err


def test_what_memory_cannot_hold_is_left_out_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(step_contenders, "ready", lambda device, names: None)
    words = ["--dtype", "float32", "--at-most", "9"]
    said = printed(capsys, "newton-schulz", *SHAPES, *words, status=1)
    assert said["results"] == []
    assert (said["verdict"]["passed"], said["verdict"]["left_out"]) == (False, 2)
    assert "2 of 8x16 float32: needs about" in said["left_out"][0]
    said = printed(capsys, "optimizer", *SHAPES)
    assert said["results"] == []
    assert "--count takes fewer" in said["left_out"][0]
