"""`moonfx bench newton-schulz`: the operator's forms against the loop that optimizers write.

The loop is torch.mm and torch.addmm, one matrix after another, as torch.optim.Muon has it. Each
form of the operator is given all matrices of one shape as a batch. gram-newton-schulz and dion take
part where they are installed. All take turns; the best turn counts. FLOP-ideal is how many times
fewer FLOPs the form has than the loop: what it can be faster if every product ran at the loop's
rate.

--model sweep has short sides from 64 to 2048, each at ratios 1 to 16 and tall at a ratio of 4. It
ends with a verdict on what "auto" takes, as does any run with --at-most: exit status 1 if that is
slower than the loop by more. Where "auto" leaves what was written there is nothing to be slower:
that counts as 1.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moonfx.bench.harness import machine
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.harness.machine import Absent
from moonfx.bench.optimizers import options as matrix_options
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers import verdict
from moonfx.bench.optimizers.newton_schulz_table import FORMS, Timing, draw, notes, table
from moonfx.bench.optimizers.verdict import Judged, take_turns
from moonfx.kernels.reference.newton_schulz import JORDAN
from moonfx.ops.newton_schulz import newton_schulz_flops, newton_schulz_form


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 1 if the verdict is a failure."""
    options = parse(argv)
    device = torch.device(options.device)
    where = machine.describe(device)
    cases = [
        (m, n, count, dtype)
        for dtype in options.dtype
        for (m, n), count in functools.reduce(
            lambda all_, some: all_ | some, matrix_options.shapes_of(options).values()
        ).items()
    ]
    done, left_out = [], []
    for m, n, count, dtype in tqdm(cases, unit="shape", leave=False, disable=None):
        # Random numbers in float32 and their squares; then X, a result, and two more of its size.
        needed = count * m * n * (8 + 4 * DTYPES[dtype].itemsize)
        if (reason := matrix_options.no_room(needed, device)) is not None:
            left_out.append(f"{count} of {m}x{n} {dtype}: {reason}")
            continue
        done.append(measure(m, n, count, dtype, options, device))
    judged = [Judged(t.name, t.ratio, t.again, t.as_written) for t in done]
    found = verdict.judge(judged, options.at_most, len(left_out)) if options.at_most else None
    status = int(found is not None and not found.passed)
    if options.plot and done:
        draw(done, f"Newton-Schulz, {where['hardware']}", options.plot)
    if options.json:
        results = {"where": where, "results": [to_dict(t) for t in done], "left_out": left_out}
        given = found.to_dict() if found else None
        print(json.dumps({**results, "verdict": given}, indent=1))
        return status
    print(machine.text(where))
    print(f"{options.steps} steps, best of {options.repeats}\n")
    print("\n".join([table(done), *notes(done, left_out)]))
    if found is not None:
        print("\n" + found.line("the loop", "1.00x by definition"))
    return status


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench newton-schulz",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    matrix_options.add(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("auto", *FORMS, *others.NAMES),
        default=("auto", *FORMS, *others.NAMES),
        help="beside the loop and what auto takes, which are always measured",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument(
        "--at-most",
        type=float,
        metavar="RATIO",
        help=f"fail where auto takes longer than so many times the loop "
        f"(--model sweep: {verdict.ALLOWED})",
    )
    options = matrix_options.parse(parser, argv)
    if options.at_most is None and "sweep" in options.model and not options.shape:
        options.at_most = verdict.ALLOWED
    return options


def loop(X: Tensor, steps: int) -> list[Tensor]:
    """What optimizers write, for each matrix of a batch."""
    a, b, c = JORDAN
    done = []
    for matrix in X:
        Y = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        for _ in range(steps):
            A = Y @ Y.T
            Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
        done.append(Y if matrix.shape[0] <= matrix.shape[1] else Y.T)
    return done


def measure(
    m: int, n: int, count: int, dtype: str, options: argparse.Namespace, device: torch.device
) -> Timing:
    """All contenders in turns, after a call each that does not count."""
    steps = options.steps
    X = torch.randn(count, m, n, device=device)
    X = X.div_(X.norm(dim=(-2, -1), keepdim=True)).to(DTYPES[dtype])
    form, why = newton_schulz_form(device, X.dtype, count, m, n, steps)
    written = newton_schulz_flops(m, n, steps)
    ideal = {f: written / newton_schulz_flops(m, n, steps, f, X.dtype) for f in FORMS}
    as_written = form == "plain" and (device.type == "cpu" or count == 1)
    timing = Timing(m, n, count, dtype, form, why, as_written, ideal)
    calls: dict[str, Callable[[], Any]] = {"loop": lambda: loop(X, steps)}
    for name in FORMS:
        if name in options.only or (name == form and not as_written):
            operator = torch.ops.moonfx.newton_schulz
            calls[name] = functools.partial(operator, X, list(JORDAN) * steps, name)
    # Another shape is one compilation more of the same functions: Dynamo stops after a few of them.
    torch.compiler.reset()
    for name in [name for name in others.NAMES if name in options.only]:
        try:
            given = others.iteration(name, steps, device)
            others.check_patience(name, count * written, device, options.patience)
            calls[name] = others.checked(given.call, X)
            timing.notes[name] = given.note
        except Absent as reason:
            timing.absent[name] = str(reason)
    for name in ("loop", *FORMS):
        if name in calls:
            calls[name]()
    timing.seconds = {name: [] for name in calls}
    take_turns(calls, timing.seconds, options.repeats, device)
    if options.at_most is not None and timing.ratio > options.at_most:
        pair = {name: calls[name] for name in ("loop", form)}
        take_turns(pair, timing.seconds, verdict.AGAIN * options.repeats, device)
        timing.again = True
    return timing


def to_dict(timing: Timing) -> dict[str, Any]:
    speedups = {name: timing.speedup(name) for name in timing.seconds if name != "loop"}
    return asdict(timing) | {"speedup": speedups, "auto_ratio": timing.ratio}


if __name__ == "__main__":
    raise SystemExit(main())
