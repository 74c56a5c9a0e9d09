"""`moonfx bench newton-schulz`: the operator's forms against the loop that optimizers write.

The loop is torch.mm and torch.addmm, one matrix after another, as torch.optim.Muon has it. Each
form of the operator is given all matrices of one shape as a batch. All take turns; the best turn
counts. FLOP-ideal is how many times fewer FLOPs the form has than the loop: what it can be faster
if every product ran at the loop's rate.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from moonfx.bench import arguments, bars, machine, plot
from moonfx.bench.cases import DTYPES
from moonfx.bench.matrices import MODELS, fewer
from moonfx.bench.table import milliseconds
from moonfx.ops.newton_schulz import newton_schulz_flops, newton_schulz_form

FORMS = ("plain", "symmetric", "gram")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass
class Timing:
    """One shape.

    Args:
        form, why: what "auto" takes.
        seconds: of each turn, by contender: "loop" and the forms.
        flop_ideal: by form.
    """

    m: int
    n: int
    count: int
    dtype: str
    form: str
    why: str
    flop_ideal: dict[str, float]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def speedup(self, form: str) -> float:
        return self.best("loop") / self.best(form)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    options = parse(argv)
    device = torch.device(options.device)
    where = machine.describe(device)
    shapes: dict[tuple[int, int], int] = {}
    for name in options.model if not options.shape else []:
        shapes |= fewer(MODELS[name], options.count)
    shapes |= dict.fromkeys(options.shape or [], options.count or 4)
    cases = [(m, n, count, dtype) for dtype in options.dtype for (m, n), count in shapes.items()]
    done = [
        measure(m, n, count, dtype, options.steps, device, options.repeats)
        for m, n, count, dtype in tqdm(cases, unit="shape", leave=False, disable=None)
    ]
    if options.plot:
        named = [f"{t.m}x{t.n} {t.dtype}" for t in done]
        heights = {form: [t.speedup(form) for t in done] for form in FORMS}
        title = f"Newton-Schulz, {where['hardware']}"
        bars.draw(title, named, heights, "times as fast as the loop", options.plot)
    if options.json:
        print(json.dumps({"where": where, "results": [to_dict(t) for t in done]}, indent=1))
        return 0
    print("\n".join(f"{name}: {text}" for name, text in where.items()))
    print(f"{options.steps} steps, best of {options.repeats}\n")
    print(table(done))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench newton-schulz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sizes(parser)
    parser.add_argument(
        "--shape", nargs="+", type=shape, metavar="MxN", help="instead of a model's"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    options = parser.parse_args(argv)
    check(parser, options)
    return options


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """What both optimizers' benchmarks are asked."""
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=["smollm2"], help="whose matrices (smollm2)"
    )
    parser.add_argument("--count", type=int, help="at most so many matrices of a shape (all)")
    parser.add_argument("--steps", type=int, default=5, help="Newton-Schulz steps (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=arguments.new_file, metavar="PNG", help="draw how many times as fast"
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("count", "steps", "repeats"):
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"--{name} must be at least 1, got {given}")
    if options.plot and (reason := plot.missing()):
        parser.error(reason)


def shape(word: str) -> tuple[int, int]:
    m, _, n = word.partition("x")
    if not (m.isdigit() and n.isdigit() and int(m) and int(n)):
        raise argparse.ArgumentTypeError(f"a shape is rows x columns, as 576x1536, got {word!r}")
    return int(m), int(n)


def loop(X: Tensor, steps: int) -> list[Tensor]:
    """What optimizers write, for each matrix of a batch."""
    a, b, c = COEFFICIENTS
    done = []
    for matrix in X:
        Y = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        for _ in range(steps):
            A = Y @ Y.T
            Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
        done.append(Y if matrix.shape[0] <= matrix.shape[1] else Y.T)
    return done


def measure(
    m: int, n: int, count: int, dtype: str, steps: int, device: torch.device, repeats: int
) -> Timing:
    X = torch.randn(count, m, n, device=device)
    X = (X / X.norm(dim=(-2, -1), keepdim=True)).to(DTYPES[dtype])
    numbers = list(COEFFICIENTS) * steps
    calls: dict[str, Callable[[], Any]] = {"loop": lambda: loop(X, steps)}
    operator = torch.ops.moonfx.newton_schulz
    calls |= {form: functools.partial(operator, X, numbers, form) for form in FORMS}
    form, why = newton_schulz_form(device, X.dtype, count, m, n, steps)
    written = newton_schulz_flops(m, n, steps)
    ideal = {f: written / newton_schulz_flops(m, n, steps, f, X.dtype) for f in FORMS}
    timing = Timing(m, n, count, dtype, form, why, ideal, {name: [] for name in calls})
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            timing.seconds[name].append(machine.seconds(call, device))
    return timing


def to_dict(timing: Timing) -> dict[str, Any]:
    return asdict(timing) | {"speedup": {form: timing.speedup(form) for form in FORMS}}


def table(done: Sequence[Timing]) -> str:
    rows = []
    for t in done:
        row = [f"{t.m}x{t.n}", t.count, t.dtype, milliseconds(t.best("loop"))]
        row += [f"{t.speedup(f):.2f} of {t.flop_ideal[f]:.2f}" for f in FORMS]
        rows.append([*row, f"{t.form}: {t.speedup(t.form):.2f}x"])
    titles = ["X", "matrices", "dtype", "loop ms", *(f"{f} of FLOP-ideal" for f in FORMS), "auto"]
    align = ["left", "right", "left", "right", *["right"] * len(FORMS), "left"]
    return tabulate(rows, titles, disable_numparse=True, colalign=align)


if __name__ == "__main__":
    raise SystemExit(main())
