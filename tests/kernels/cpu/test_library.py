"""The build: its reasons and remedies, its cache, other compilers and processors."""

import itertools
import os
import platform
import shlex
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.cpu import moba as cpu
from tests.support.cpu_kernel import DTYPES, assert_like_reference
from tests.support.moba_cases import Case

FAKE_COMPILER = """
import pathlib, sys, time
log = pathlib.Path({log!r})
if "--version" in sys.argv:
    print("fake 1.0")
    sys.exit()
with log.open("a") as file:
    file.write(" ".join(sys.argv) + "\\n")
time.sleep(0.1)
if any(flag in sys.argv for flag in {refuse!r}):
    sys.exit("unsupported option")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("library")
"""


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, refuse: tuple[str, ...]) -> Path:
    script, log = folder / "compiler.py", folder / "log"
    script.write_text(FAKE_COMPILER.format(log=str(log), refuse=refuse))
    monkeypatch.setenv("CXX", shlex.join([sys.executable, str(script)]))
    return log


def test_a_missing_compiler_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    expected = (
        "no C++ compiler found (CXX=/nowhere/g++ -m64 is no program): install g++ "
        "(apt-get install g++), or set CXX to a C++17 compiler"
    )
    assert cpu.available() == expected
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="apt-get install g"):
        cpu.forward(q, q, q, MobaArguments(2, 2))
    cpu_build.library.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh_build))
    assert "no g++, c++ or clang++ on PATH" in str(cpu.available())


def test_a_failing_compiler_is_a_reason_with_its_message(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=("-std=c++17",))
    assert "It said: unsupported option" in str(cpu.available())
    assert len(log.read_text().splitlines()) == len(cpu_build.EXTRAS)
    assert not list((fresh_build / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    (fresh_build / "file").touch()
    monkeypatch.setenv("MOONFX_CACHE_DIR", str(fresh_build / "file" / "cache"))
    assert "set MOONFX_CACHE_DIR to a folder" in str(cpu.available())


def test_a_library_that_cannot_be_loaded_is_a_reason_with_a_remedy(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    assert "loaded from" in str(cpu.available())


def test_without_openmp_or_native_the_kernel_is_still_built(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=("-fopenmp", "-mcpu=native"))
    cpu_build.build()
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    assert "-march=native" in lines[-1]
    assert "-fopenmp" not in lines[-1]


BUILDS = [
    ("SSE, without OpenMP", "g++", "-march=x86-64"),
    ("AVX2, without OpenMP", "g++", "-march=x86-64-v3"),
    ("clang, AVX-512", "clang++", "-march=x86-64-v4"),
]


# What a register's width decides: dims and keys that fill none, several, or not all of one.
BUILT = [
    Case(queries=333, length=333, block=32, topk=3, dim=24, value_dim=40),
    Case(queries=3, length=200, block=16, topk=3, sinks=1, dim=33),
    Case(queries=90, length=90, topk=3, packing="runs", softcap=0.5, bias="all", scale=0.25),
    Case(queries=90, length=90, topk=3, packing="one token each", padding="holes", dim=64),
]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64, whose flags it gives")
@pytest.mark.parametrize(
    ("compiler", "flag"), [row[1:] for row in BUILDS], ids=[x[0] for x in BUILDS]
)
def test_other_compilers_and_processors_compute_the_same(
    compiler: str, flag: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    needed = {"-march=x86-64-v3": " avx2 ", "-march=x86-64-v4": " avx512dq "}.get(flag, "")
    if shutil.which(compiler) is None or needed not in cpu_build.processor():
        pytest.skip(f"needs {compiler} and a processor with{needed or ' SSE'}")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(cpu_build, "FLAGS", [x.replace("-O3", "-O1") for x in cpu_build.FLAGS])
    monkeypatch.setattr(cpu_build, "EXTRAS", ((flag,),))
    assert cpu.available() is None
    runs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        for case, dtype in itertools.product(BUILT, DTYPES):
            assert_like_reference(case.but(dtype=dtype))
        tensors = BUILT[0].inputs()
        runs.append(cpu.forward(*tensors, BUILT[0].arguments())[0])
    assert torch.equal(*runs)


def test_the_first_build_says_that_it_compiles_and_later_ones_nothing(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    path = cpu_build.build()
    said = capfd.readouterr().err
    assert said.startswith("moonfx: compiling its CPU kernel")
    assert str(path) in said
    assert len(said.splitlines()) == 1
    cpu_build.build()
    assert capfd.readouterr().err == ""


def test_builds_that_race_leave_one_library_and_nothing_else(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(fresh_build, monkeypatch, refuse=())
    paths: list[Path] = []
    race = [threading.Thread(target=lambda: paths.append(cpu_build.build())) for _ in range(3)]
    for thread in race:
        thread.start()
    for thread in race:
        thread.join()
    assert len(set(paths)) == 1
    assert list((fresh_build / "cache").iterdir()) == paths[:1]
    compiled = len(log.read_text().splitlines())
    assert cpu_build.build() == paths[0]
    assert len(log.read_text().splitlines()) == compiled  # the second time it is only found


def test_another_compiler_or_flag_gives_another_library(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(fresh_build, monkeypatch, refuse=())
    first = cpu_build.build()
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -O1")
    second = cpu_build.build()
    monkeypatch.setattr(cpu_build, "FLAGS", [*cpu_build.FLAGS, "-g"])
    assert len({first, second, cpu_build.build()}) == 3
