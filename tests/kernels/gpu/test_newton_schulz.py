"""Newton-Schulz on a GPU: by Triton's interpreter, compiled ahead of time, and on a GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.gpu import configs as gpu_configs
from moonfx.kernels.reference import newton_schulz as reference
from moonfx.kernels.torch_ops import newton_schulz as by_torch
from moonfx.ops import dispatch, gpu_waves, newton_schulz_cost, newton_schulz_runs
from moonfx.ops.newton_schulz import newton_schulz_form
from tests.kernels.gpu.test_aot import UNIT
from tests.support.newton_schulz_cases import (
    CASES,
    COEFFICIENTS,
    GRAM,
    SYMMETRIC,
    error,
    matrix,
    tolerance,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gpu = pytest.importorskip("moonfx.kernels.gpu.moba")
gpu_newton_schulz = pytest.importorskip("moonfx.kernels.gpu.newton_schulz")

OPERATOR = torch.ops.moonfx.newton_schulz
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = COEFFICIENTS["quintic"]
# Of the largest entry. float32: three TF32 products. The others: rounded once, bfloat16 by the
# interpreter towards zero.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def symmetric(*shape: int, dtype: torch.dtype) -> Tensor:
    one = torch.randn(shape, device=DEVICE)
    return ((one + one.mT) / 2).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("batch", "m", "depth", "by_columns"), [(2, 40, 70, False), (1, 65, 33, True), (1, 1, 5, False)]
)
def test_half_of_a_product_is_computed_and_mirrored(
    batch: int, m: int, depth: int, by_columns: bool, dtype: torch.dtype
) -> None:
    X = torch.randn(batch, m, depth, device=DEVICE).to(dtype)
    X = X.mT.contiguous().mT if by_columns else X
    M, N = (symmetric(batch, m, m, dtype=dtype) for _ in range(2))
    out = gpu_newton_schulz.symmetric(X, X, 0.5, (M, -2.0), (N, 3.0))
    expected = 0.5 * X.double() @ X.double().mT - 2 * M.double() + 3 * N.double()
    assert out.dtype == dtype
    assert out.equal(out.mT)
    assert (out - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@triton.jit
def _corners(rows, columns, first, SIZE: tl.constexpr):
    place = first + tl.arange(0, SIZE)
    i, j = gpu_newton_schulz.corner(place)
    tl.store(rows + tl.arange(0, SIZE), i)
    tl.store(columns + tl.arange(0, SIZE), j)


@pytest.mark.parametrize("row", [0, 1000, 4000])
def test_a_place_in_a_triangle_is_its_row_and_column(row: int) -> None:
    """4,000 tiles a side are a matrix of half a million rows: the root is taken of 6e7."""
    first, size = row * (row + 1) // 2, 16384
    rows, columns = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    _corners[(1,)](rows, columns, first, SIZE=size)
    expected = itertools.islice(((i, j) for i in itertools.count(row) for j in range(i + 1)), size)
    found = zip(rows.tolist(), columns.tolist(), strict=True)
    assert list(found) == list(expected)


@triton.jit
def _strips(rows, columns, tiles, SIZE: tl.constexpr):
    place = tl.minimum(tl.arange(0, SIZE), tiles * (tiles + 1) // 2 - 1)
    i, j = gpu_newton_schulz.in_strips(place, tiles)
    tl.store(rows + tl.arange(0, SIZE), i)
    tl.store(columns + tl.arange(0, SIZE), j)


# tiles a side, rows of tiles that a wave of 132 programs reads at most, and row by row
STRIPS = [(1, 1, 1), (5, 5, 5), (8, 8, 8), (19, 19, 19), (32, 28, 32), (64, 31, 64)]


@pytest.mark.parametrize(("tiles", "read", "by_rows"), STRIPS)
def test_strips_are_all_of_a_triangle_and_share_what_they_read(
    tiles: int, read: int, by_rows: int
) -> None:
    count = tiles * (tiles + 1) // 2
    size = triton.next_power_of_2(count)
    rows, columns = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    _strips[(1,)](rows, columns, tiles, SIZE=size)
    found = list(zip(rows[:count].tolist(), columns[:count].tolist(), strict=True))
    triangle = [(i, j) for i in range(tiles) for j in range(i + 1)]
    assert sorted(found) == triangle

    def most(order: list[tuple[int, int]]) -> int:
        waves = [order[start : start + 132] for start in range(0, count, 132)]
        return max(len(set(itertools.chain(*wave))) for wave in waves)

    assert (most(found), most(triangle)) == (read, by_rows)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_runs_of_steps_equal_the_singular_values_map(dtype: torch.dtype, by_columns: bool) -> None:
    X = matrix("spike", 40, 48, dtype)[None].to(DEVICE)
    X = X.mT.contiguous().mT if by_columns else X
    steps = STEPS[:3]
    out = gpu_newton_schulz.newton_schulz(X, steps, (2, 1))
    expected = reference.by_singular_values(X.double(), steps)
    error = (out - expected).norm() / expected.norm()
    assert error <= {torch.float32: 2**-18, torch.float16: 2**-8}[dtype]
    assert out.stride(1 if by_columns else 2) == 1


def as_it_says(
    left: Tensor, right: Tensor, alpha: float = 1.0, *terms: tuple[Tensor, float]
) -> Tensor:
    """What `symmetric` computes: float32 sums, rounded once, and the lower half twice."""
    total = alpha * (left.float() @ right.float().mT)
    for term, factor in terms:
        total += factor * term.float()
    lower = total.to(left.dtype).tril()
    return lower + lower.tril(-1).mT


@pytest.mark.parametrize("dtype", GRAM, ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_form_is_as_precise_as_it_says(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(gpu_newton_schulz, "symmetric", as_it_says)
    steps = COEFFICIENTS[name]
    X = matrix(kind, 48, 128, dtype)[None].to(DEVICE)
    expected = reference.by_singular_values(X.double(), steps)
    plain = error(by_torch.one(X[0], steps), expected[0])
    assert plain <= tolerance(name, kind, dtype)
    runs = newton_schulz_runs.choose_runs(steps, dtype, 48, 128)
    for lengths, (factor, more) in (((1,) * len(steps), SYMMETRIC[dtype]), (runs, GRAM[dtype])):
        out = gpu_newton_schulz.newton_schulz(X, steps, lengths)
        assert error(out, expected) <= factor * plain + more


def test_runs_need_products_that_are_symmetric_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not symmetric grows from step to step, where rows are read for columns."""
    steps, runs = COEFFICIENTS["quintic"], (2, 3)
    X = matrix("gaussian", 48, 128, torch.float16)[None].to(DEVICE)
    expected = reference.by_singular_values(X.double(), steps)
    monkeypatch.setattr(gpu_newton_schulz, "symmetric", as_it_says)
    mirrored = error(gpu_newton_schulz.newton_schulz(X, steps, runs), expected)
    monkeypatch.setattr(Tensor, "tril", lambda x, diagonal=0: x if diagonal == 0 else 0 * x)
    assert error(gpu_newton_schulz.newton_schulz(X, steps, runs), expected) > 4 * mirrored


def test_the_operator_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device: gpu)
    monkeypatch.setattr(newton_schulz_cost, "triton_kernels", lambda device: gpu)
    monkeypatch.setattr("moonfx.ops.newton_schulz.triton_kernels", lambda device: gpu)
    calls = []
    kernel = gpu_newton_schulz.symmetric
    monkeypatch.setattr(
        gpu_newton_schulz, "symmetric", lambda *given: calls.append(len(given)) or kernel(*given)
    )
    X = matrix("gaussian", 20, 60, torch.float32).to(DEVICE)
    flat = [number for step in STEPS[:2] for number in step]
    expected = reference.by_singular_values(X.double(), STEPS[:2])
    for form, products in (("symmetric", 4), ("gram", 6), ("plain", 0)):
        calls.clear()
        for given in (X, X.mT):
            out = OPERATOR(given, flat, form)
            out = out if given is X else out.mT
            torch.testing.assert_close(out, expected.to(out), rtol=0, atol=2e-5)
        assert len(calls) == 2 * products


FORMS = [
    # dtype, batch, m, n, multiprocessors, form, why
    (torch.bfloat16, 48, 768, 768, 132, "symmetric", "0.67 of the FLOPs: half of X X^T and of A^2"),
    (torch.bfloat16, 48, 768, 768, 132, "symmetric", "1.40 times as fast by the waves of tiles on"),
    (torch.bfloat16, 12, 768, 3072, 132, "gram", "0.52 of the FLOPs: 2 + 1 + 2 steps"),
    (torch.float16, 1, 4096, 16384, 132, "gram", "3 + 2 steps"),
    (torch.bfloat16, 60, 576, 1536, 132, "symmetric", "below 3, for runs of steps (not measured)"),
    # 136 tiles of a triangle are two waves of 132, as all 256 are; and 1.26 waves of 108.
    (torch.bfloat16, 1, 2048, 2048, 132, "plain", "symmetric would be 1.00 times as fast"),
    (torch.bfloat16, 1, 2048, 2048, 108, "symmetric", "1.29 times as fast"),
    (torch.bfloat16, 2, 2048, 2048, 132, "symmetric", "1.20 times as fast"),
    (torch.bfloat16, 4, 2048, 2048, 132, "symmetric", "1.33 times as fast"),
    (torch.bfloat16, 1, 4096, 4096, 132, "symmetric", "1.50 times as fast"),
    (torch.bfloat16, 48, 256, 256, 132, "plain", "symmetric would be 1.00 times as fast"),
    (torch.bfloat16, 60, 192, 576, 132, "plain", "below 256 (not measured)"),
    (torch.bfloat16, 1, 768, 768, 132, "plain", "21 tiles of 128 x 128 do not fill 132"),
    (torch.float32, 48, 768, 768, 132, "plain", "float32 is left to cuBLAS"),
    (torch.float64, 48, 768, 768, 132, "plain", "float64 is computed by torch alone"),
]


@pytest.mark.parametrize(("dtype", "batch", "m", "n", "multiprocessors", "form", "why"), FORMS)
def test_a_form_that_was_never_measured_is_taken_with_care(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    batch: int,
    m: int,
    n: int,
    multiprocessors: int,
    form: str,
    why: str,
) -> None:
    monkeypatch.setattr(newton_schulz_cost, "triton_kernels", lambda device: gpu)
    monkeypatch.setattr(newton_schulz_cost, "multiprocessors", lambda device: multiprocessors)
    found = newton_schulz_form(torch.device("cuda"), dtype, batch, n, m, 5)
    assert found[0] == form
    assert why in found[1]


def test_a_gpus_form_asks_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its processor's units, nor its C++ compiler, nor its threads."""

    def asked(*given: object) -> NoReturn:
        raise AssertionError("a GPU's form was decided by the host")

    newton_schulz_cost.has_matrix_units.cache_clear()
    monkeypatch.setattr(cpu_build, "processor", asked)
    monkeypatch.setattr(cpu_build, "library", asked)
    monkeypatch.setattr(torch, "get_num_threads", asked)
    monkeypatch.setattr(newton_schulz_cost, "triton_kernels", lambda device: gpu)
    for dtype, batch, m, n, multiprocessors, form, _ in FORMS:
        monkeypatch.setattr(newton_schulz_cost, "multiprocessors", lambda _, m=multiprocessors: m)
        assert newton_schulz_form(torch.device("cuda"), dtype, batch, n, m, 5)[0] == form


def test_the_waves_are_those_of_the_kernels_tiles() -> None:
    sides = {
        config.block_m
        for (chip, size), config in gpu_newton_schulz.TILES.items()
        if size == 2 and chip != gpu_configs.INTERPRETER
    }
    assert sides == {gpu_waves.SIDE}
    assert gpu_waves.triangle(3, 513) == 3 * 15


def test_a_gpu_without_triton_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz_cost, "triton_kernels", lambda device: None)
    monkeypatch.setattr(newton_schulz_cost, "find_triton_kernels", lambda: (None, "install it"))
    found = newton_schulz_form(torch.device("cuda"), torch.bfloat16, 48, 768, 768, 5)
    assert found == ("plain", "there is no Triton kernel: install it")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.aot_newton_schulz", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


EVERY = ",".join(gpu_configs.ARCHITECTURES)
COMPILED = [
    # arguments, variants
    (("--chips", "sm_90,sm_80", "--terms", "2"), 2),
    pytest.param(("--chips", EVERY), 3 * 5, marks=pytest.mark.sweep),
    pytest.param(("--chips", EVERY, "--columns"), 3 * 5, marks=pytest.mark.sweep),
    pytest.param(("--chips", EVERY, "--dtypes", "float16,float32"), 30, marks=pytest.mark.sweep),
]


@pytest.mark.xdist_group("aot")
@pytest.mark.parametrize(("arguments", "count"), COMPILED)
def test_it_fits_its_chip_without_spills_and_uses_the_matrix_unit(
    arguments: tuple[str, ...], count: int
) -> None:
    rows = compiled(*arguments)
    assert len(rows) == count
    for row in rows:
        assert row["spills"] == 0, row
        assert row["narrow_stores"] == 0, row
        assert row["shared"] <= gpu_configs.ARCHITECTURES[row["chip"]], row
        assert set(row["looped"]) == {UNIT[row["chip"]]}, row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "m", "n"), [(4, 768, 768), (2, 768, 3072), (3, 577, 1500)])
def test_real_sizes_equal_the_plain_form(batch: int, m: int, n: int, dtype: torch.dtype) -> None:
    X = torch.stack([matrix("spectrum 1..1e-3", m, n, dtype)] * batch).to(DEVICE)
    flat = [number for step in STEPS for number in step]
    expected = reference.by_singular_values(X[0].double(), STEPS)
    plain = (OPERATOR(X, flat, "plain")[0] - expected).norm()
    for form in ("symmetric", "gram"):
        for given in (X, X.mT):
            out = OPERATOR(given, flat, form)
            assert out[0].equal(out[-1])
            out = out[0] if given is X else out[0].mT
            assert (out - expected).norm() <= 4 * plain + 2**-6 * expected.norm()


@pytest.mark.gpu
def test_a_graph_records_it() -> None:
    X = torch.stack([matrix("spike", 512, 768, torch.bfloat16)] * 4).to(DEVICE)
    flat = [number for step in STEPS for number in step]
    expected = OPERATOR(X, flat, "gram")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPERATOR(X, flat, "gram")
    graph.replay()
    assert out.equal(expected)
