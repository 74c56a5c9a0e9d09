"""The benchmarks of Newton-Schulz and of optimizer steps: on tiny sizes, what they say adds up."""

import json
from pathlib import Path
from typing import Any

import pytest

from moonfx import backend, cli
from moonfx.bench import newton_schulz, optimizer
from moonfx.bench.matrices import MODELS, fewer, sweep


def test_the_matrices_are_those_of_the_models() -> None:
    entries = {
        name: sum(m * n * k for (m, n), k in shapes.items()) for name, shapes in MODELS.items()
    }
    assert entries["smollm2"] == 134_515_008 - 49152 * 576 - 61 * 576  # less embedding and norms
    assert entries["llama-8b"] == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert sum(MODELS["smollm2"].values()) == 210
    assert fewer(MODELS["smollm2"], 2) == dict.fromkeys(MODELS["smollm2"], 2)
    assert sorted(sweep(64, 256)) == [
        *((64, 64), (64, 128), (64, 256)),
        *((128, 128), (128, 256), (256, 256)),
    ]


def test_newton_schulz_measures_the_loop_and_each_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = ["--shape", "8x16", "16x8", "--count", "2", "--repeats", "2", "--dtype", "float32"]
    picture = tmp_path / "forms.png"
    assert cli.main(["bench", "newton-schulz", *words, "--json", "--plot", str(picture)]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
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
    assert "symmetric of FLOP-ideal" in capsys.readouterr().out


WRONG: list[tuple[Any, list[str], str]] = [
    (newton_schulz, ["--shape", "8by8"], "a shape is rows x columns, as 576x1536, got '8by8'"),
    (newton_schulz, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
    (optimizer, ["--count", "0"], "--count must be at least 1, got 0"),
    (optimizer, ["--only", "adam"], "invalid choice: 'adam'"),
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


def test_an_optimizer_s_step_is_timed_eager_compiled_and_converted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backend.DEFAULTS, "compiler", "eager")  # Inductor would take a minute
    monkeypatch.setitem(MODELS, "tiny", {(8, 16): 2, (16, 8): 1})
    words = [
        "--model",
        "tiny",
        "--only",
        "eager",
        "moonfx",
        "converted",
        "--repeats",
        "1",
        "--rest",
    ]
    monkeypatch.setattr(optimizer, "VOCABULARY", 16)
    monkeypatch.setattr(optimizer, "GAINS", 2)
    assert cli.main(["bench", "optimizer", *words, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert {c: len(turns) for c, turns in result["seconds"].items()} == {
        "eager": 1,
        "moonfx": 1,
        "converted": 1,
    }
    rows = result["report"]["iterations"]
    assert sum(row["count"] for row in rows) == 3
    assert result["of_inductor"] == {}
