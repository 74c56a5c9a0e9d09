"""What the GPU kernels compile to for chips that are not here: it fits, and uses matrix units.

Compilers run in a process of their own (aot.py), without Triton's interpreter. `make sweep` takes
every shape class on every chip; `make test` the common ones.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moonfx.kernels.gpu.configs import ARCHITECTURES

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("aot")  # one process compiles for every test

TENSOR = 512  # columns of tensor memory
# Where the time goes, and the instruction that a 16-bit product there has to become.
FORWARD = ("forward._tiles", "forward_small_blocks.small_blocks")
ATTENTION = (*FORWARD, "backward_dkdv._walk", "backward_dq._tiles")
UNIT = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_90": "HGMMA",  # warp groups; HMMA runs there too, at half the rate
    "sm_100": "UTCHMMA",  # tensor memory
    "gfx942": "v_mfma",
}
ENTRIES = {
    *ATTENTION,
    "block_means.mean_kernel",
    "block_means.part_kernel",
    "route.route_kernel",
    "route.merge_kernel",
    "counting_sort._walk",
    "block_index._count",
    "block_index._place",
    "merge._merge",
    "backward_preprocess._delta",
    "backward_join.join",
    "backward_dq._sum",
    "decode._attend",
    "decode._combine",
}


def aot(*arguments: str) -> list[str]:
    """Lines that aot.py prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.aot", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.splitlines()


@cache
def compiled(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in aot(*arguments, "--json")]


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with compiled variants, a line for each."""
    found = []
    for row in rows:
        kernel, chip, case, use = row["kernel"], row["chip"], row["case"], row["resources"]
        which = f"{kernel} on {chip}, {case}"
        if use is None:
            found.append(f"{which}: {row['error']}")
            continue
        if (use["shared"] > ARCHITECTURES[chip] and not too_wide(row)) or use["tensor"] > TENSOR:
            found.append(f"{which}: {use['shared']} bytes, {use['tensor']} columns")
        if kernel in FORWARD and case["dim"] <= 128 and use["spills"]:
            found.append(f"{which}: {use['spills']} spills")
        units = set(use["looped"])
        common = case["dtype"] != "float32" and case["block"] >= 64 and case["dim"] <= 128
        if kernel in ATTENTION and common and units != {UNIT[chip]}:
            found.append(f"{which}: its loops run {units or 'no matrix unit'}")
    return found


def too_wide(row: dict[str, Any]) -> bool:
    """A known limit: the smallest tile of float32 heads beyond 256 has 160 KB in the backward."""
    case = row["case"]
    wide = case["dim"] > 256 and case["dtype"] == "float32"
    return wide and row["chip"] == "sm_86" and row["kernel"].startswith("backward_")


def test_the_common_shapes_fit_every_chip_and_use_its_matrix_units() -> None:
    rows = compiled("--fast")
    assert wrong(rows) == []
    assert {row["kernel"] for row in rows} >= ENTRIES
    assert {row["chip"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}


ONE = ("--dims", "128", "--blocks", "512", "--only", "forward._tiles")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("maxnreg=128", "spills"),
        pytest.param("num_warps=2", "its loops run {'HMMA'}", marks=pytest.mark.sweep),
        ("num_stages=9", "bytes"),
    ],
)
def test_too_few_registers_warps_or_bytes_would_be_seen(options: str, said: str) -> None:
    found = wrong(compiled(*ONE, "--options", options))
    assert any(said in line for line in found), found


def test_a_new_length_compiles_nothing() -> None:
    lengths = ("8192", "8208", "8191", "10000")
    features = "plain,everything,dense,decode"
    lines = aot("--keys", "--features", features, "--lengths", ",".join(lengths))
    keys = {
        length: {key for line in lines for at, _, key in [line.partition(" ")] if at == length}
        for length in lengths
    }
    assert len(keys["8192"]) > len(ENTRIES)
    for length in lengths[1:]:
        assert keys[length] == keys["8192"], length


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_every_configuration_fits_and_uses_the_matrix_unit(chip: str) -> None:
    assert wrong(compiled("--every", "--chips", chip)) == []
