"""The words after `moonfx bench attention`, and the cases that they ask for."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moonfx.bench.attention import ceilings
from moonfx.bench.attention.cases import PASSES, SUITES, Case
from moonfx.bench.attention.contenders import BACKENDS
from moonfx.bench.attention.results import read
from moonfx.bench.harness import arguments, into_page
from moonfx.bench.harness.arguments import DTYPES
from moonfx.policy import check_block_topk_sinks

SIZES = {
    "batch": (1, "rows"),
    "heads": (8, "query heads"),
    "kv_heads": (2, "key and value heads"),
    "block": (512, "tokens per block"),
    "topk": (3, "blocks that a query attends"),
    "sinks": (0, "first blocks that are always attended"),
}
LISTS: dict[str, tuple[list[Any], str]] = {
    "length": ([16384, 32768], "tokens"),
    "dim": ([64, 128], "head dims"),
    "dtype": (["float32", "bfloat16"], "of the inputs"),
    "work": (list(PASSES), "passes"),
}
QUICK = {"length": [4096], "dim": [64], "block": 256}


def parse(argv: Sequence[str] | None, described: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench attention",
        description=described.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shapes(parser)
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="named cases; --length, --dim, --dtype, --work then pick among them",
    )
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    add_contenders(parser)
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--predict", choices=ceilings.PUBLISHED, help="measure nothing: the roofline of that chip"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    into_page.add(parser)
    parser.add_argument(
        "--plot", type=arguments.new_file, metavar="PNG", help="draw speedup over length"
    )
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(words)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def add_contenders(parser: argparse.ArgumentParser) -> None:
    """Who is measured, how often, and what is too much."""
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        choices=["flex", "reference"],
        help="contenders beside dense and moonfx; FlexAttention compiles for each case",
    )
    parser.add_argument(
        "--dense",
        choices=("auto", *BACKENDS),
        default="auto",
        help="backend of F.scaled_dot_product_attention (torch's own choice)",
    )
    parser.add_argument(
        "--reference-up-to", type=int, default=4096, metavar="N", help="tokens (%(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300.0,
        metavar="S",
        help="leave out a contender whose call is predicted to take longer (%(default)s s)",
    )


def add_shapes(parser: argparse.ArgumentParser) -> None:
    for name, (size, help_text) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{help_text} ({size})")
    parser.add_argument("--queries", type=int, help="of the last tokens only (of all)")
    for name, (several, help_text) in LISTS.items():
        choices = {"dtype": DTYPES, "work": PASSES}.get(name)
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=str if choices else int,
            choices=choices,
            help=f"{help_text} ({' '.join(map(str, several))})",
        )


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be run, and fills the defaults in."""
    if options.repeats < 1:
        raise ValueError("--repeats must be at least 1")
    if options.plot and (reason := arguments.why_no_plot()):
        raise ValueError(reason)
    options.run = read(options.read) if options.read else None
    if options.into and not options.read:
        raise ValueError("--into needs --from")
    given = [name for name in (*SIZES, "queries") if getattr(options, name) is not None]
    if options.suite:
        if given or options.quick:
            words = [f"--{name.replace('_', '-')}" for name in given] or ["--quick"]
            raise ValueError(
                f"{' and '.join(words)} cannot be given with --suite {options.suite}, whose cases "
                "have sizes: --length, --dim, --dtype and --work pick among them"
            )
        if not list(cases(options)):
            raise ValueError(f"--suite {options.suite} has no such case")
        return
    defaults = {name: value for name, (value, _) in (SIZES | LISTS).items()}
    for name, value in (defaults | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_block_topk_sinks(options.block, options.topk, options.sinks)
    sizes = [options.batch, options.heads, options.kv_heads, *options.dim, *options.length]
    if min(sizes) < 1 or options.heads % options.kv_heads:
        raise ValueError("sizes must be at least 1, and --heads a multiple of --kv-heads")
    if options.queries is not None and not 1 <= options.queries <= min(options.length):
        raise ValueError(f"--queries must be 1 to the least --length, got {options.queries}")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The suite's, or all that the shapes make."""
    if options.suite:
        for case in SUITES[options.suite]():
            wanted = {name: getattr(options, name) for name in LISTS}
            if all(
                getattr(case, name) in (some or [getattr(case, name)])
                for name, some in wanted.items()
            ):
                yield case
        return
    for dtype, dim, length, work in itertools.product(
        options.dtype, options.dim, options.length, options.work
    ):
        yield Case(
            *(options.batch, options.heads, options.kv_heads, options.queries or length, length),
            *(dim, dtype),
            *(options.block, options.topk, options.sinks, work),
        )
