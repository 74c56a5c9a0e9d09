"""`moonfx bench attention`: block-sparse attention against dense, side by side in one run.

Dense is F.scaled_dot_product_attention(is_causal=True), with the key and value heads expanded
beforehand or with enable_gqa=True, whichever is the faster at a quarter of the length. The two are
timed in turns, and the best of the turns counts. The ideal is what the skipped products alone would
give: key tokens that dense attends over those that the policy attends (routing counts as nothing).
Peak extra memory is what one call needs beyond its inputs (results, saved tensors, gradients and
scratch), from the high-water mark of the process's resident memory, on a GPU of the allocator.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from moonfx.bench import machine
from moonfx.ops.flops import attended_keys
from moonfx.ops.moba import moba_attention
from moonfx.policy import check_block_topk_sinks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward+backward")
QUICK = {"length": [4096], "dim": [64], "block": 256, "repeats": 3}


@dataclass(frozen=True)
class Case:
    """One causal attention.

    Shapes: q [batch, heads, length, dim], k and v [batch, kv_heads, length, dim].
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    dtype: str
    block: int
    topk: int
    sinks: int
    work: str

    @property
    def ideal(self) -> float:
        dense = attended_keys(self.length, self.length, self.length, 1)
        return dense / attended_keys(self.length, self.length, self.block, self.topk)


@dataclass(frozen=True)
class Result:
    """Seconds of each turn, and bytes; None where memory could not be measured."""

    case: Case
    baseline: str
    dense: list[float]
    moba: list[float]
    dense_bytes: int | None
    moba_bytes: int | None

    @property
    def speedup(self) -> float:
        return min(self.dense) / min(self.moba)

    @property
    def share(self) -> float:
        return self.speedup / self.case.ideal

    def row(self) -> list[Any]:
        case, mib = self.case, 2**20
        return [
            case.length,
            case.dim,
            case.dtype,
            case.work,
            f"{min(self.dense) * 1e3:.1f}",
            f"{min(self.moba) * 1e3:.1f}",
            f"{self.speedup:.2f}x",
            f"{case.ideal:.2f}x",
            f"{self.share:.0%}",
            "-" if self.dense_bytes is None else f"{self.dense_bytes / mib:.0f}",
            "-" if self.moba_bytes is None else f"{self.moba_bytes / mib:.0f}",
            "-" if self.moba_bytes is None else f"{self.moba_bytes / case.length / case.batch:.0f}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "ideal": self.case.ideal,
            "speedup": self.speedup,
            "share_of_ideal": self.share,
            "dense_median": median(self.dense),
            "moba_median": median(self.moba),
        }


HEADERS = [
    *("N", "D", "dtype", "pass", "dense ms", "moba ms", "speedup", "ideal", "share"),
    *("dense MiB", "moba MiB", "moba B/token"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 2 for a wrong argument."""
    options = parse(argv)
    device = torch.device(options.device)
    where = machine.describe(device)
    cases = list(table(options))
    results = []
    with tqdm(cases, unit="case", leave=False, disable=None) as progress:
        for case in progress:
            progress.set_description(f"N={case.length} D={case.dim} {case.dtype} {case.work}")
            results.append(measure(case, device, options.repeats))
    if options.json:
        print(json.dumps({**where, "results": [r.to_dict() for r in results]}, indent=2))
        return 0
    first = cases[0]
    print("\n".join(f"{name}: {text}" for name, text in where.items()))
    print(
        f"batch {first.batch}, heads {first.heads}, kv heads {first.kv_heads}, "
        f"block {first.block}, topk {first.topk}, sinks {first.sinks}; "
        f"best of {options.repeats} turns\n"
    )
    print(
        tabulate(
            [r.row() for r in results], HEADERS, colalign=("right",) * 2, disable_numparse=True
        )
    )
    for work in options.work:
        worst = min(r.share for r in results if r.case.work == work)
        print(f"lowest share of the ideal speedup, {work}: {worst:.0%}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench attention",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, help_text in (
        ("batch", 1, "rows"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key and value heads"),
        ("block", 512, "tokens per block"),
        ("topk", 3, "blocks that a query attends"),
        ("sinks", 0, "first blocks that are always attended"),
        ("repeats", 3, "turns that each of the two takes"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help_text} (%(default)s)"
        )
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128], help="head dims")
    parser.add_argument("--length", type=int, nargs="+", default=[16384, 32768], help="tokens")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--work", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in words:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(words)
    try:
        check_block_topk_sinks(options.block, options.topk, options.sinks)
    except ValueError as error:
        parser.error(str(error))
    sizes = [options.batch, options.heads, options.kv_heads, options.repeats]
    if min(*sizes, *options.dim, *options.length) < 1 or options.heads % options.kv_heads:
        parser.error("sizes must be at least 1, and --heads a multiple of --kv-heads")
    return options


def table(options: argparse.Namespace) -> Iterator[Case]:
    for dtype, dim, length, work in itertools.product(
        options.dtype, options.dim, options.length, options.work
    ):
        yield Case(
            options.batch,
            options.heads,
            options.kv_heads,
            length,
            dim,
            dtype,
            options.block,
            options.topk,
            options.sinks,
            work,
        )


def measure(case: Case, device: torch.device, repeats: int) -> Result:
    """Dense and sparse in turns, after one warm-up each, which also measures the memory."""
    baseline = faster_baseline(case, device)
    dense, moba = calls(case, device, baseline)
    dense_bytes = machine.peak_bytes(dense, device)
    moba_bytes = machine.peak_bytes(moba, device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, spent in zip((dense, moba), times, strict=True):
            spent.append(machine.seconds(call, device))
    return Result(case, baseline, *times, dense_bytes, moba_bytes)


def faster_baseline(case: Case, device: torch.device) -> str:
    if case.heads == case.kv_heads:
        return "expanded"
    short = replace(case, length=max(1, case.length // 4))
    dense = {name: calls(short, device, name)[0] for name in ("expanded", "enable_gqa")}
    times: dict[str, list[float]] = {name: [] for name in dense}
    for _ in range(3):
        for name, call in dense.items():
            times[name].append(machine.seconds(call, device))
    return min(times, key=lambda name: min(times[name]))


def calls(
    case: Case, device: torch.device, baseline: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The dense and the sparse call, on the same random tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        made = torch.randn(case.batch, heads, case.length, case.dim, generator=generator)
        return made.to(device, DTYPES[case.dtype])

    query, key, value = (random(n) for n in (case.heads, case.kv_heads, case.kv_heads))
    gradient = random(case.heads)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=baseline == "enable_gqa"
        )

    def moba(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return moba_attention(query, key, value, case.block, case.topk, sinks=case.sinks)

    group = case.heads // case.kv_heads if baseline == "expanded" else 1
    expanded = [x.repeat_interleave(group, dim=1) for x in (key, value)]
    return (
        run(dense, [query, *expanded], gradient, case.work),
        run(moba, [query, key, value], gradient, case.work),
    )


def run(
    attention: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, work: str
) -> Callable[[], object]:
    if work == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attention(*inputs)

        return forward

    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, gradient)


if __name__ == "__main__":
    raise SystemExit(main())
