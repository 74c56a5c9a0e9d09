"""The benchmarks of Newton-Schulz and of optimizer steps: on tiny sizes, what they say adds up."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moonfx
from moonfx.backend import entry
from moonfx.bench.attention.contenders import Absent
from moonfx.bench.harness import machine
from moonfx.bench.optimizers import newton_schulz, optimizer, step_contenders, steps, verdict
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers.matrices import MODELS, fewer, sweep
from moonfx.bench.optimizers.verdict import Judged, judge
from moonfx.bench.optimizers.written_muon import WrittenMuon
from moonfx.capture.inductor import empty_inductor_caches
from moonfx.cli import command as cli

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No package of others, whatever is installed, and as many threads afterwards as before."""
    monkeypatch.setattr(others, "imported", nothing)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def nothing(module: str, package: str) -> Any:
    raise Absent("not installed")


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    """What a benchmark says in JSON."""
    assert cli.main(["bench", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_matrices_are_those_of_the_models() -> None:
    entries = {
        name: sum(m * n * k for (m, n), k in shapes.items()) for name, shapes in MODELS.items()
    }
    assert entries["smollm2"] == 134_515_008 - 49152 * 576 - 61 * 576  # less embedding and norms
    assert entries["llama-8b"] == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert sum(MODELS["smollm2"].values()) == 210
    assert fewer(MODELS["smollm2"], 2) == dict.fromkeys(MODELS["smollm2"], 2)


def test_the_sweep_holds_every_reading_of_its_range() -> None:
    """Short sides and long sides of 64 to 2048, ratios to 16, and tall matrices."""
    found = sweep()
    sides = [64, 128, 256, 512, 1024, 2048]
    wide = {(m, r * m) for m in sides for r in (1, 2, 4, 8, 16)}
    assert set(found) == wide | {(4 * m, m) for m in sides}
    assert {k for m in sides for n in sides if n >= m for k in [(m, n)] if n <= 16 * m} <= wide
    assert found[64, 64] == found[2048, 2048] == 4
    assert found[2048, 32768] == 1
    assert max(m * n * k for (m, n), k in found.items()) * 4 <= 256 << 20


SHAPES = ["--shape", "8x16", "16x8", "--count", "2", "--repeats", "2"]


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


Clock = dict[str, float]


def ticking(monkeypatch: pytest.MonkeyPatch, spent: Callable[[int], float]) -> None:
    """Has the i-th measured call take `spent(i)` seconds."""
    count = iter(range(10_000))
    monkeypatch.setattr(machine, "seconds", lambda call, device: spent(next(count)))


@pytest.mark.parametrize(
    ("name", "spent", "status", "again"),
    [
        ("as fast", lambda i: 1.0, 0, 0),
        ("slower always", lambda i: 1.0 + 0.1 * (i % 2), 1, 1),
        ("slower in the first turns alone", lambda i: 1.0 + 0.1 * (i % 2 and i < 4), 0, 1),
    ],
)
def test_the_verdict_measures_failures_again_and_fails_by_its_exit_status(
    name: str,
    spent: Callable[[int], float],
    status: int,
    again: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newton_schulz, "newton_schulz_form", lambda *size: ("symmetric", "a test"))
    ticking(monkeypatch, spent)
    words = ["--shape", "8x16", "--repeats", "2", "--dtype", "float32", "--only", "auto"]
    said = printed(capsys, "newton-schulz", *words, "--at-most", "1.03", status=status)
    assert said["verdict"]["passed"] == (not status)
    assert said["verdict"]["measured_again"] == again
    turns = 2 + again * verdict.AGAIN * 2
    assert {k: len(v) for k, v in said["results"][0]["seconds"].items()} == {
        "loop": turns,
        "symmetric": turns,
    }


def test_the_verdict_names_the_worst_and_counts_what_was_left() -> None:
    measured = [
        Judged("64x64", 0.9, False, False),
        Judged("8x8", 1.0, False, True),
        Judged("64x128", 1.0301, True, False),
    ]
    assert judge(measured, 1.03).said("the loop", "1.00x by definition") == (
        "verdict: FAIL: at worst 1.030x the time of the loop, on 64x128 (allowed: 1.03x); 1 of 3 "
        "slower; 1 measured again; 1 left as written, 1.00x by definition"
    )
    assert judge(measured[:2], 1.03).passed
    assert judge(measured[:1], 1.03, left_out=2).said("the loop", "").endswith("; 2 left out")
    assert not judge(measured, 1.03).passed


def test_the_sweep_alone_asks_for_a_verdict_unasked() -> None:
    assert newton_schulz.parse(["--model", "sweep"]).at_most == 1.03
    assert newton_schulz.parse([]).at_most is None
    assert newton_schulz.parse(["--model", "sweep", "--at-most", "2"]).at_most == 2
    each = optimizer.parse(["--model", "sweep", "--each"])
    assert (each.at_most, each.only) == (1.03, ("inductor", "moonfx"))
    assert optimizer.parse([]).at_most is None


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


QUICK = ["--model", "tiny", "--repeats", "1", "--steps", "1"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that cost no compilation: Inductor would take a minute."""
    monkeypatch.setitem(entry.DEFAULTS, "compiler", "eager")
    monkeypatch.setitem(MODELS, "tiny", {(8, 16): 1, (16, 8): 1})
    monkeypatch.setattr(step_contenders, "VOCABULARY", 16)
    monkeypatch.setattr(step_contenders, "GAINS", 2)
    monkeypatch.setattr(step_contenders, "BACKENDS", {"inductor": "eager", "moonfx": "moonfx"})
    monkeypatch.setattr(step_contenders, "ready", lambda device, names: None)


def test_an_optimizer_s_step_is_timed_eager_compiled_and_converted(
    tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed(capsys, "optimizer", *QUICK, "--threads", "1")
    (result,) = said["results"]
    assert said["where"]["threads"].startswith("1 on ")
    ours = ("eager", "inductor", "moonfx", "converted")
    assert {c: len(turns) for c, turns in result["seconds"].items()} == dict.fromkeys(ours, 1)
    assert result["absent"] == dict.fromkeys(others.NAMES, "not installed")
    assert result["interleaved"]
    rows = result["report"]["iterations"]
    assert sum(row["count"] for row in rows) == 2
    best = {c: min(turns) for c, turns in result["seconds"].items()}
    assert result["of_inductor"]["moonfx"] == pytest.approx(best["moonfx"] / best["inductor"])
    before, after = (sum(row[f"flops_{k}"] for row in rows) for k in ("before", "after"))
    assert result["flop_ideal"]["moonfx"] == pytest.approx(after / before)
    assert result["flop_ideal"]["eager"] == 1
    spent = result["compile_seconds"]
    assert result["compile_of_inductor"]["moonfx"] == pytest.approx(
        spent["moonfx"] / spent["inductor"]
    )


def test_no_turn_of_a_step_compiles(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender is compiled before the turns, and stays so when the next one is."""
    compiled: list[str] = []

    def inductor(graph: Any, inputs: Any) -> Any:
        compiled.append("inductor")
        return graph.forward

    def ours(graph: Any, inputs: Any, options: Any) -> Any:
        compiled.append("moonfx")
        return graph.forward

    monkeypatch.setattr(step_contenders, "BACKENDS", {"inductor": inductor, "moonfx": ours})
    monkeypatch.setattr(moonfx, "report", lambda optimizer: None)
    before: list[str] = []
    take = steps.take_turns
    monkeypatch.setattr(steps, "take_turns", lambda *given: (before.extend(compiled), take(*given)))
    options = optimizer.parse([*QUICK, "--only", *step_contenders.COMPILED])
    steps.measure("tiny", {(8, 16): 1}, "float32", "bfloat16", options, apart=False)
    assert before == compiled == ["inductor", "moonfx"]

    compiled.clear()
    options = optimizer.parse([*QUICK, "--only", *step_contenders.COMPILED, "--compiles", "2"])
    steps.measure("tiny", {(8, 16): 1}, "float32", "bfloat16", options, apart=False)
    assert compiled == ["inductor", "moonfx"] * 2


def test_a_compilation_finds_nothing_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on disk nor in the process, which keeps the kernels that it has loaded."""
    from torch._inductor.codecache import CppCodeCache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.setitem(CppCodeCache.cache, "a kernel", lambda: None)
    with empty_inductor_caches():
        assert "a kernel" not in CppCodeCache.cache
        assert list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("*")) == []
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


def test_contenders_that_memory_cannot_hold_at_once_are_measured_one_after_another(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*QUICK, "--only", "eager", "converted", "--rest"]
    options = optimizer.parse(words)
    one, two = (step_contenders.needed_bytes(MODELS["tiny"], options, "float32", k) for k in (1, 2))
    monkeypatch.setattr(machine, "free_bytes", lambda device: (one + two) // 2)
    (result,) = printed(capsys, "optimizer", *words)["results"]
    assert not result["interleaved"]
    assert set(result["seconds"]) == {"eager", "converted"}
    assert cli.main(["bench", "optimizer", *words]) == 0
    assert "not in turns" in capsys.readouterr().out


def test_each_shape_is_a_step_with_a_verdict_and_a_plot(
    tiny: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    ticking(monkeypatch, lambda i: 1.0 + 0.5 * (i % 2))
    picture = tmp_path / "steps.png"
    words = [*QUICK, "--each", "--iterate", "float32"]
    assert cli.main(["bench", "optimizer", *words, "--plot", str(picture)]) == 1
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("8x", "16x"))] == [
        ["8x16", "1"],
        ["16x8", "1"],
    ]
    assert (
        "verdict: FAIL: at worst 1.500x the time of Inductor's step, on 8x16, parameters float32, "
        "Newton-Schulz float32 (allowed: 1.03x); 2 of 2 slower; 2 measured again" in text
    )


def test_the_written_muon_is_torch_s_in_another_dtype() -> None:
    """In bfloat16 the two differ by their roundings alone, of updates of 0.2 * lr."""
    made = []
    for kind in ("torch", "written"):
        generator = torch.Generator().manual_seed(0)
        sizes = [(8, 16), (16, 8)]
        given = [nn.Parameter(torch.randn(s, generator=generator)) for s in sizes]
        muon: torch.optim.Optimizer
        muon = torch.optim.Muon(given, lr=0.1, adjust_lr_fn="match_rms_adamw")
        if kind == "written":
            muon = WrittenMuon(given, 0.1, 5, torch.bfloat16)
        for _ in range(3):
            for p in given:
                p.grad = torch.randn(p.shape, generator=generator)
            muon.step()
        made.append([p.detach() for p in given])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


class FakeGram:
    """gram-newton-schulz's interface, without its work."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        print("Auto-tuning")  # noqa: T201
        type(self).given = given

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        return X.clone()


class FakeMuon(torch.optim.SGD):
    """A Muon with the keywords of both packages."""

    given: dict[str, Any]

    def __init__(self, parameters: Any, use_polar_express: bool = True, **given: Any) -> None:
        super().__init__(parameters, lr=given["lr"])
        type(self).given = {"use_polar_express": use_polar_express, **given}


def fakes(module: str, package: str) -> Any:
    return SimpleNamespace(
        GramNewtonSchulz=FakeGram,
        Muon=FakeMuon,
        zeropower_via_newtonschulz5=lambda X: X.clone(),
    )


def test_packages_of_others_take_part_where_they_are_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "imported", fakes)
    words = [*SHAPES, "--dtype", "float32", "--only", "auto", *others.NAMES]
    results = printed(capsys, "newton-schulz", *words)["results"]
    assert all(set(others.NAMES) <= set(r["seconds"]) and not r["absent"] for r in results)
    assert FakeGram.given["ns_coefficients"] == [[3.4445, -4.7750, 2.0315]] * 5
    assert FakeGram.given["ns_use_kernels"] is False
    assert cli.main(["bench", "newton-schulz", *words]) == 0
    assert "dion: its own coefficients" in capsys.readouterr().out


def test_their_optimizers_step_the_same_parameters_by_the_same_rule(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "imported", fakes)
    words = [*QUICK, "--steps", "5", "--only", *others.NAMES]
    (result,) = printed(capsys, "optimizer", *words)["results"]
    assert set(result["seconds"]) == set(others.NAMES)
    assert "float16" in result["notes"]["gram-newton-schulz"]
    assert FakeMuon.given["mu"] == 0.95
    assert FakeMuon.given["use_polar_express"] is False
    (result,) = printed(capsys, "optimizer", *words, "--iterate", "float32")["results"]
    assert result["absent"] == {
        "gram-newton-schulz": "its Muon iterates in float16, not in float32",
        "dion": "its Muon iterates in bfloat16, not in float32",
    }


def other_interface(*given: Any, **named: Any) -> Any:
    raise TypeError("unexpected keyword\nand more")


def crash(X: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


REASONS: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("gram-newton-schulz", {}, [], "AttributeError: "),
    (
        "gram-newton-schulz",
        {"GramNewtonSchulz": other_interface},
        [],
        "TypeError: unexpected keyword",
    ),
    ("dion", {}, ["--steps", "4"], "it always takes 5 steps, not 4"),
    ("dion", {"zeropower_via_newtonschulz5": crash}, [], "RuntimeError: no kernel image"),
    (
        "dion",
        {"zeropower_via_newtonschulz5": lambda X: X.mT},
        [],
        "it gave torch.Size([1, 16, 8]) for torch.Size([1, 8, 16])",
    ),
    (
        "dion",
        {"zeropower_via_newtonschulz5": torch.clone},
        ["--patience", "1e-12"],
        "a call is predicted to take over --patience 1e-12 s (bfloat16 products run at ",
    ),
]


@pytest.mark.parametrize(("name", "package", "words", "reason"), REASONS)
def test_what_does_not_run_of_others_is_a_reason_and_no_crash(
    name: str,
    package: dict[str, Any],
    words: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(others, "imported", lambda *asked: SimpleNamespace(**package))
    shape = ["--shape", "8x16", "--count", "1", "--repeats", "1", "--dtype", "float32"]
    said = printed(capsys, "newton-schulz", *shape, "--only", name, *words)
    assert said["results"][0]["absent"][name].startswith(reason)
    assert name not in said["results"][0]["seconds"]


def test_a_package_that_is_not_installed_is_told_from_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    (tmp_path / "there.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match=r"not installed \(pip install git"):
        others.imported("not_there.at_all", "dion")
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        others.imported("there", "dion")
