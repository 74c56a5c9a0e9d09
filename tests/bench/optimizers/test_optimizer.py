"""`moonfx bench optimizer`: on tiny steps, what it says adds up."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moonfx
from moonfx.bench.harness import machine
from moonfx.bench.optimizers import optimizer, step_contenders, steps
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers.matrices import MODELS
from moonfx.bench.optimizers.written_muon import WrittenMuon
from moonfx.capture.inductor import empty_inductor_caches
from moonfx.cli import command as cli
from tests.support.optimizer_bench import QUICK, printed, ticking


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
