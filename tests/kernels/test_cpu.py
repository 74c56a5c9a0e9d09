"""The C++ kernel against the reference; its routing, its determinism, its memory, its build."""

import os
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moonfx.kernels import cpu, cpu_build, reference
from tests.moba_cases import Case, cases

needs_kernel = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

# float32: sums of some hundred products, and an exponential good to 1e-7, of values up to 10.
# The others: one rounding of the result on each side, the weights' rounding, a delta taken from the
# rounded output: two units in the last place (2**-7, 2**-10), or of the largest term of a sum.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}
DTYPES = list(TOLERANCE)

TABLE = [
    ("one block exactly", Case(queries=8, length=8)),
    ("a length that no block divides", Case(queries=333, length=333, block=32, topk=3)),
    ("one query head per kv head", Case(group=1, queries=200, length=200, dim=64, value_dim=64)),
    ("eight query heads per kv head", Case(group=8, queries=100, length=100, dim=32, block=16)),
    ("fewer queries than keys", Case(queries=70, length=200, block=16, topk=3, sinks=1)),
    ("one query", Case(queries=1, length=200, block=16, topk=3, sinks=1)),
    ("a few queries", Case(queries=5, length=200, block=16, topk=3)),
    ("blocks of one key", Case(queries=90, length=90, block=1, topk=4, sinks=2)),
    ("only the own block", Case(queries=150, length=150, block=32, topk=1)),
    ("only the own block and sinks", Case(queries=150, length=150, block=16, topk=3, sinks=2)),
    ("blocks wider than a key tile", Case(batch=1, queries=800, length=800, block=320)),
    ("the dense regime", Case(batch=1, queries=700, length=700, block=512, dim=64)),
    ("the dense regime, one query", Case(queries=1, length=700, block=512, topk=2, dim=64)),
    ("value wider than key", Case(queries=80, length=80, dim=8, value_dim=136, block=16)),
    ("odd dims", Case(queries=80, length=80, dim=13, value_dim=7, block=16)),
    ("dims of one", Case(queries=80, length=80, dim=1, value_dim=1, block=16)),
    ("wide heads", Case(batch=1, queries=150, length=150, dim=256, value_dim=256, block=32)),
    ("a negative scale", Case(queries=80, length=80, scale=-0.5)),
    ("more blocks than a panel", Case(batch=1, queries=300, length=300, block=2, topk=70, sinks=3)),
    *((f"padding: {p}", Case(batch=3, queries=90, length=90, padding=p, topk=3, sinks=1))
      for p in ("left", "right", "holes", "one row empty")),
    *((f"one query, padding: {p}", Case(batch=3, queries=1, length=90, padding=p, topk=3))
      for p in ("left", "right", "holes", "one row empty")),
    *((f"layout: {x}", Case(queries=90, length=90, layout=x)) for x in ("by token", "expanded",
                                                                        "strided")),
]  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test choose the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no memory of the library that this process has loaded."""
    monkeypatch.setenv("MOONFX_CACHE_DIR", str(tmp_path / "cache"))
    cpu_build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu_build.library.cache_clear()


def assert_like_reference(case: Case, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs or case.inputs()]
    out, lse = reference.moba_attention(*leaves, case.block, case.topk, **case.named())
    grad_out = (torch.randint(-8, 9, out.shape) / 8).to(out)
    grad_lse = torch.randint(-8, 9, lse.shape) / 8
    expected = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    tensors = [x.detach() for x in leaves]
    got, got_lse = cpu.forward(*tensors, *case.policy())
    grads = cpu.backward(grad_out, grad_lse, *tensors, got, got_lse, *case.policy())
    for name, mine, theirs in zip(
        ("out", "lse", "dq", "dk", "dv"), (got, got_lse, *grads), (out, lse, *expected), strict=True
    ):
        assert mine.dtype == theirs.dtype, name
        tolerance = TOLERANCE[torch.float32 if name == "lse" else case.dtype]
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def chosen(query: Tensor, key: Tensor, block: int, topk: int, sinks: int) -> Tensor:
    """Which blocks the kernel attends, bool [B, Hq, Nq, n]: V names each key's block."""
    blocks = -(-key.shape[2] // block)
    value = torch.eye(blocks).repeat_interleave(block, 0)[: key.shape[2]]
    value = value.expand(*key.shape[:2], *value.shape)
    return cpu.forward(query, key, value, block, topk, sinks, 0.0, None)[0].gt(0)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for _, case in TABLE], ids=[name for name, _ in TABLE])
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype))


@needs_kernel
@given(case=cases())
@settings(max_examples=60)
def test_any_problem_equals_the_reference(case: Case) -> None:
    assert_like_reference(case)


@needs_kernel
@pytest.mark.parametrize("block", [3, 48, 96])
def test_blocks_that_no_panel_divides_equal_the_reference(block: int) -> None:
    # Means over 3 * 2**i keys that are multiples of 3 are exact.
    case = Case(queries=200, length=200, block=block, topk=2, dim=16)
    query, key, value = case.inputs()
    assert_like_reference(case, (query, key * 3, value))


@needs_kernel
def test_results_lie_token_major() -> None:
    case = Case(queries=80, length=80, dim=8, value_dim=16)
    q, k, v = case.inputs()
    out, lse = cpu.forward(q, k, v, *case.policy())
    grads = cpu.backward(torch.ones_like(out), None, q, k, v, out, lse, *case.policy())
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *grads))
    assert lse.is_contiguous()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_every_bit_repeats_whatever_the_number_of_threads(
    dtype: torch.dtype, padding: str, threads: None
) -> None:
    case = Case(queries=800, length=800, dim=16, block=32, topk=4, padding=padding, dtype=dtype)
    q, k, v = case.inputs()
    q, k, v = (
        x * torch.rand(()) for x in (q, k, v)
    )  # off the grid: sums now depend on their order
    grad = torch.randn(q.shape[:3] + v.shape[3:]).to(dtype)
    runs = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        out, lse = cpu.forward(q, k, v, *case.policy())
        runs.append([out, lse, *cpu.backward(grad, lse, q, k, v, out, lse, *case.policy())])
    for other in runs[1:]:
        for first, again in zip(runs[0], other, strict=True):
            assert torch.equal(first, again)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_query_alone_selects_the_blocks_that_it_selects_among_others(queries: int) -> None:
    """Blocks whose scores differ in the last bit only: any other order of a sum would show."""
    query = torch.randn(1, 4, 400, 33)
    key = torch.randn(1, 2, 1, 33) + 1e-6 * torch.randn(1, 2, 400, 33)
    full = chosen(query, key, 8, 9, 1)
    assert full[..., -1, :].sum(-1).eq(9).all()
    for length in (400, 397, 333):
        part = chosen(query[:, :, length - queries : length], key[:, :, :length], 8, 9, 1)
        assert torch.equal(part, full[:, :, length - queries : length, : part.shape[-1]])


@needs_kernel
@pytest.mark.parametrize("queries", [1, 100], ids=["decode", "prefill"])
def test_ties_go_to_the_lower_block(queries: int) -> None:
    query, key = torch.ones(1, 2, queries, 8), torch.ones(1, 1, 100, 8)
    key[:, :, 40:48] = 2.0  # one block is better, the others are equal
    got = chosen(query, key, 8, 5, 1)
    assert got[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2, 5, 12]
    assert torch.equal(got, reference.select_blocks(query, key, 8, 5, sinks=1))


@needs_kernel
def test_large_scores_do_not_overflow_and_a_nan_stays_in_its_row() -> None:
    case = Case(queries=60, length=60, topk=3)
    q, k, v = case.inputs()
    q = q * 1e4
    expected, expected_lse = reference.moba_attention(q, k, v, case.block, case.topk)
    out, lse = cpu.forward(q, k, v, *case.policy())
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)  # lse 1e4 has unit 1e-3
    torch.testing.assert_close(lse, expected_lse)
    q[0, 1, 33] = torch.nan
    again = cpu.forward(q, k, v, *case.policy())[0]
    assert again[0, 1, 33].isnan().all()
    again[0, 1, 33] = out[0, 1, 33]
    assert torch.equal(again, out)


@needs_kernel
def test_an_empty_problem_gives_empty_results() -> None:
    q, k, v = torch.empty(2, 4, 0, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out, lse = cpu.forward(q, k, v, 2, 2, 0, None, None)
    assert out.shape == (2, 4, 0, 8)
    grads = cpu.backward(out, None, q, k, v, out, lse, 2, 2, 0, None, None)
    assert [x.count_nonzero().item() for x in grads] == [0, 0, 0]
    assert grads[1].shape == k.shape


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scratch_is_a_few_copies_of_key_and_value(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    used: list[int] = []
    call = cpu.call

    def record(*arguments: Any) -> int:
        used.append(call(*arguments))
        return used[-1]

    monkeypatch.setattr(cpu, "call", record)
    torch.set_num_threads(2)
    sizes = {}
    for length in (4096, 8192):
        q, k, v = (torch.randn(1, h, length, 64, dtype=dtype) for h in (4, 2, 2))
        out, lse = cpu.forward(q, k, v, 64, 4, 1, None, None)
        cpu.backward(out, None, q, k, v, out, lse, 64, 4, 1, None, None)
        sizes[length] = used[-2:]
    for index, copies in enumerate((2, 3)):
        grown = sizes[8192][index] - sizes[4096][index]
        width = cpu.compute_dtype(cpu.load(), dtype).itemsize
        packed = copies * width * k[:, :, 4096:].numel()
        means = 2 * 64 * 64 * 4 * 2
        assert grown <= 1.1 * packed + means + 2 * 2**20  # and each thread's unit has more rows


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
        cpu.forward(q, q, q, 2, 2, 0, None, None)
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
