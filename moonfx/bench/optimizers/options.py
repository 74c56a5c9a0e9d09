"""What both optimizers' benchmarks are asked: whose matrices, how many, how often, where."""

import argparse
from collections.abc import Sequence

import torch

from moonfx.bench.harness import arguments, machine
from moonfx.bench.optimizers.matrices import MODELS, Shapes, fewer

COUNT = 4  # matrices of a shape that --shape names


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=["smollm2"], help="whose matrices (smollm2)"
    )
    parser.add_argument(
        "--shape", nargs="+", type=shape, metavar="MxN", help="these instead of a model's"
    )
    parser.add_argument(
        "--count", type=int, help=f"at most so many matrices of a shape (all; --shape: {COUNT})"
    )
    parser.add_argument("--steps", type=int, default=5, help="Newton-Schulz steps (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="leave out another package whose call is predicted to take longer (%(default)g s)",
    )
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="of a CPU (torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=arguments.new_file, metavar="PNG", help="draw how many times as fast"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The words, checked; so many threads are set as they say."""
    options = parser.parse_args(argv)
    for name in ("count", "steps", "repeats", "threads", "compiles"):
        given = getattr(options, name, None)
        if given is not None and given < 1:
            parser.error(f"--{name} must be at least 1, got {given}")
    for name in ("patience", "at_most"):
        given = getattr(options, name)
        if given is not None and not given > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {given:g}")
    if options.plot and (reason := arguments.why_no_plot()):
        parser.error(reason)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def shapes_of(options: argparse.Namespace) -> dict[str, Shapes]:
    """By the name of whose they are."""
    if options.shape:
        return {"given": dict.fromkeys(options.shape, options.count or COUNT)}
    return {name: fewer(MODELS[name], options.count) for name in options.model}


def shape(word: str) -> tuple[int, int]:
    m, _, n = word.partition("x")
    if not (m.isdigit() and n.isdigit() and int(m) and int(n)):
        raise argparse.ArgumentTypeError(f"a shape is rows x columns, as 576x1536, got {word!r}")
    return int(m), int(n)


def no_room(needed: int, device: torch.device) -> str | None:
    """Why so many bytes cannot be had, and the remedy."""
    free = machine.free_bytes(device)
    if needed <= free:
        return None
    return (
        f"needs about {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} are free: "
        "--count takes fewer matrices of a shape"
    )
