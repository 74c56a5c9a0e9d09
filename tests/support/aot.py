"""Compiles what the GPU kernels would launch, and prints what it needs of each chip.

    python -m tests.support.aot --chips sm_90 --dims 64,128 --only attend

No GPU is needed; TRITON_INTERPRET must not be set. `aot_capture` says what is recorded, and
`aot_resources` what is read.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

import torch
from tabulate import tabulate

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import configs as gpu_configs
from moonfx.kernels.gpu import moba as gpu
from moonfx.kernels.gpu.configs import ARCHITECTURES
from tests.support.aot_capture import Launch, recording
from tests.support.aot_resources import Resources, resources

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FEATURES = ("plain", "everything", "dense", "decode")


@dataclass(frozen=True)
class Case:
    """One call: a head dim, a dtype, a block size, one of FEATURES, and the keys."""

    dim: int
    dtype: str
    block: int
    features: str = "plain"
    length: int = 4096

    def run(self) -> None:
        """Forward and backward, on tensors without memory."""
        batch, heads, kv_heads = 2, 8, 2
        topk = 2 * self.length if self.features == "dense" else 8
        queries = 1 if self.features == "decode" else self.length
        everything = self.features == "everything"
        with torch.device("meta"):
            dtype = DTYPES[self.dtype]
            # As models have them: rotary embeddings leave copies by head, values lie by token.
            query = torch.empty(batch, heads, queries, self.dim, dtype=dtype)
            key = torch.empty(batch, kv_heads, self.length, self.dim, dtype=dtype)
            value = torch.empty(batch, self.length, kv_heads, self.dim, dtype=dtype).transpose(1, 2)
            mask = torch.empty(batch, self.length, dtype=torch.bool) if everything else None
            segments = torch.empty(batch, self.length, dtype=torch.int64) if everything else None
            bias = torch.empty(batch, heads, self.length) if everything else None
        softcap = 30.0 if everything else 0.0
        arguments = MobaArguments(
            *(self.block, topk, 1), key_mask=mask, softcap=softcap, key_bias=bias, segments=segments
        )
        out, lse, routes = gpu.forward(query, key, value, arguments)
        if self.features != "decode":
            grads = torch.empty_like(out), torch.empty_like(lse)
            gpu.backward(*grads, query, key, value, out, lse, arguments, routes=routes)


@dataclass(frozen=True)
class Row:
    """A compiled variant: the kernel, the first case that launches it, and what came of it."""

    kernel: str
    chip: str
    case: Case
    warps: int
    stages: int
    seconds: float
    error: str = ""
    resources: Resources | None = None


def record(chips: list[str], cases: list[Case], only: str = "") -> list[tuple[Launch, Case]]:
    """Each variant that the cases of a length launch, once."""
    found: dict[tuple[str, int, str], tuple[Launch, Case]] = {}
    for chip, case in itertools.product(chips, cases):
        with recording(chip) as launches:
            case.run()
        for launch in launches:
            if re.search(only, launch.name):
                found.setdefault((chip, case.length, launch.key), (launch, case))
    return list(found.values())


def compile_one(launch: Launch, case: Case) -> Row:
    """What came of one variant; a failure to compile is a finding too."""
    started = time.monotonic()
    error, needed = "", None
    try:
        needed = resources(launch.compile())
    except Exception as failure:  # noqa: BLE001 - whatever the compiler raises is the finding
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
    options = launch.options["num_warps"], launch.options["num_stages"]
    seconds = time.monotonic() - started
    return Row(launch.name, launch.chip, case, *options, round(seconds, 1), error, needed)


def compile_all(variants: list[tuple[Launch, Case]], processes: int) -> Iterator[Row]:
    """In the order given. Processes are forks: a kernel and its constants need no pickling."""
    global _variants
    _variants = variants
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_compile_at, range(len(variants)))


_variants: list[tuple[Launch, Case]] = []


def _compile_at(index: int) -> Row:
    return compile_one(*_variants[index])


def table(rows: list[Row]) -> str:
    headers = ["kernel", "chip", *(field.name for field in fields(Case))]
    headers += ["warps", "stages", "s", "regs", "spills", "KiB", "of", "in loops", "outside"]
    lines = []
    for row in rows:
        line = [row.kernel, row.chip, *asdict(row.case).values(), row.warps, row.stages]
        line.append(row.seconds)
        if row.resources is None:
            lines.append([*line, row.error])
            continue
        use = row.resources
        line += [
            use.registers,
            use.spills,
            use.shared >> 10,
            ARCHITECTURES[row.chip] >> 10,
        ]
        line += [" ".join(f"{n}:{c}" for n, c in x.items()) for x in (use.looped, use.straight)]
        lines.append(line)
    return str(tabulate(lines, headers))


# `make test` takes these: what most models run, in all its forms on sm_90, in one on the others.
FAST = [
    *((("sm_90",), Case(dim, "bfloat16", 128, feature), "")
      for feature in FEATURES for dim in (128, 64)),
    *((("sm_90",), Case(dim, "float32", 128), "forward._tiles") for dim in (128, 64)),
    # A cache with so many blocks that programs share them.
    (("sm_90",), Case(128, "bfloat16", 128, "decode", 1 << 17), "^(route|decode)"),
    (("sm_80", "sm_100", "gfx942"), Case(128, "bfloat16", 128), "^(forward|backward)"),
]  # fmt: skip


def every_case() -> list[Case]:
    """A case for each shape class of the table, and each set of features at the common ones."""
    shapes = dict.fromkeys(
        (shape.dim, str(shape.dtype).removeprefix("torch."), shape.block)
        for shape, _ in gpu_configs.every("forward", "sm_90")
    )
    features = itertools.product((64, 96, 128, 256), ("bfloat16", "float32"), FEATURES[1:])
    return [
        *(Case(*shape) for shape in shapes),
        *(Case(dim, dtype, 128, feature) for dim, dtype, feature in features),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", default="sm_90", help=f"of {','.join(ARCHITECTURES)}, or all")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--blocks", default="128")
    parser.add_argument("--features", default="plain", help=f"of {','.join(FEATURES)}")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--fast", action="store_true", help="what `make test` takes instead")
    parser.add_argument("--every", action="store_true", help="all shape classes of the chips")
    parser.add_argument("--only", default="", help="kernels whose module.name has this pattern")
    parser.add_argument("--options", default="", help="to try, such as num_warps=8,num_stages=2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    parser.add_argument(
        "--keys", action="store_true", help="print Triton's cache keys: no compiler"
    )
    arguments = parser.parse_args()
    chips = list(ARCHITECTURES) if arguments.chips == "all" else arguments.chips.split(",")
    cases = [
        Case(int(dim), dtype, int(block), feature, int(length))
        for dim, dtype, block, feature, length in itertools.product(
            arguments.dims.split(","),
            arguments.dtypes.split(","),
            arguments.blocks.split(","),
            arguments.features.split(","),
            arguments.lengths.split(","),
        )
    ]
    if arguments.fast:
        found = [x for chips, case, only in FAST for x in record(list(chips), [case], only)]
        variants = list({(x.chip, x.key): (x, case) for x, case in reversed(found)}.values())[::-1]
    else:
        variants = record(chips, every_case() if arguments.every else cases, arguments.only)
    if arguments.keys:
        sys.stdout.writelines(f"{case.length} {launch.key}\n" for launch, case in variants)
        return
    options = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", arguments.options)}
    variants = [
        (replace(launch, options=launch.options | options), case) for launch, case in variants
    ]
    rows = compile_all(variants, arguments.processes)
    if arguments.json:
        sys.stdout.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    else:
        sys.stdout.write(table(list(rows)) + "\n")


if __name__ == "__main__":
    main()
