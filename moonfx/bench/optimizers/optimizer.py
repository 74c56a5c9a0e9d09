"""`moonfx bench optimizer`: one step of Muon, eager, under Inductor and under moonfx.

eager       torch.optim.Muon
inductor    torch.compile(torch.optim.Muon(...).step)
moonfx      torch.compile(torch.optim.Muon(...).step, backend="moonfx")
converted   moonfx.convert_optimizer(torch.optim.AdamW(...)), as it runs by itself
gram-newton-schulz, dion    their Muon, as it runs by itself, where they are installed

All step the same parameters with the same gradients, and take turns; the best turn counts. Where
memory does not allow that they are measured one after another, and the output says so. "FLOP-ideal"
is the share of eager's time if Newton-Schulz's FLOPs were all there is to a step. Compile time is
what the first two steps take beyond two later ones, with empty Inductor caches for each contender,
after each has compiled a small step, which loads what any compilation needs. --rest adds an
embedding and the gains of norms, stepped by torch.optim.AdamW (compiled the same way; by Inductor
for others).

--each makes a step of each shape: --model sweep --each is the sweep, short sides from 64 to 2048 at
ratios 1 to 16, and tall at 4. It ends with a verdict, as does any run with --at-most: exit status 1
if a step takes longer under moonfx than so many times Inductor's.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from moonfx.bench.harness import machine
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.optimizers import bars, optimizer_table, step_contenders, steps, verdict
from moonfx.bench.optimizers import options as matrix_options
from moonfx.bench.optimizers.optimizer_table import left_as_written, title
from moonfx.bench.optimizers.step_contenders import COMPILED, CONTENDERS, OURS
from moonfx.bench.optimizers.steps import Measured
from moonfx.bench.optimizers.verdict import Judged, Verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 1 if the verdict is a failure."""
    options = parse(argv)
    device = torch.device(options.device)
    where = machine.describe(device)
    models = matrix_options.shapes_of(options)
    if options.each:
        models = {f"{m}x{n}": {(m, n): k} for s in models.values() for (m, n), k in s.items()}
    kinds = list(itertools.product(options.iterate, options.dtype))
    cases = [(n, s, dtype, iterate) for iterate, dtype in kinds for n, s in models.items()]
    step_contenders.ready(device, tuple(name for name in COMPILED if name in options.only))
    done: list[Measured] = []
    left_out = []
    for name, shapes, dtype, iterate in tqdm(cases, unit="step", leave=False, disable=None):
        needed = [
            step_contenders.needed_bytes(shapes, options, dtype, k) for k in (1, len(options.only))
        ]
        if (reason := matrix_options.no_room(needed[0], device)) is not None:
            left_out.append(f"{name} {dtype}: {reason}")
            continue
        apart = matrix_options.no_room(needed[1], device) is not None
        done.append(steps.measure(name, shapes, dtype, iterate, options, apart))
    found = judged(done, options.at_most, len(left_out)) if options.at_most else None
    status = int(found is not None and not found.passed)
    if options.plot and done:
        draw(done, f"One optimizer step, {where['hardware']}", options)
    if options.json:
        results = {"where": where, "results": [to_dict(r) for r in done], "left_out": left_out}
        given = found.to_dict() if found else None
        print(json.dumps({**results, "verdict": given}, indent=1))
        return status
    print(optimizer_table.text(where, options, done, left_out, found))
    return status


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench optimizer",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    matrix_options.add(parser)
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, help="(all; --each: inductor and moonfx)"
    )
    parser.add_argument("--each", action="store_true", help="each shape is a step of its own")
    parser.add_argument(
        "--at-most",
        type=float,
        metavar="RATIO",
        help=f"fail where moonfx takes longer than so many times Inductor's step "
        f"(--each: {verdict.ALLOWED})",
    )
    parser.add_argument(
        "--compiles",
        type=int,
        default=1,
        help="compilations of each; the best counts (%(default)s)",
    )
    parser.add_argument("--rest", action="store_true", help="with what AdamW steps")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of parameters (float32)"
    )
    parser.add_argument(
        "--iterate",
        nargs="+",
        choices=("bfloat16", "float32"),
        default=["bfloat16"],
        help="dtype of Newton-Schulz: torch.optim.Muon's is bfloat16; float32 is that of a Muon "
        "as users write it, which takes its place",
    )
    options = matrix_options.parse(parser, argv)
    options.only = options.only or (COMPILED if options.each else CONTENDERS)
    if options.each and options.at_most is None:
        options.at_most = verdict.ALLOWED
    if options.at_most is not None and not set(COMPILED) <= set(options.only):
        parser.error("a verdict is on moonfx against inductor: --only must name both")
    return options


def judged(done: Sequence[Measured], at_most: float, left_out: int) -> Verdict:
    found = [
        Judged(title(one), ratio, one.again, left_as_written(one))
        for one in done
        if (ratio := one.of("moonfx", "inductor")) is not None
    ]
    return verdict.judge(found, at_most, left_out)


def to_dict(one: Measured) -> dict[str, Any]:
    ratios = {
        "of_eager": {c: one.of(c, "eager") for c in one.found},
        "of_inductor": {c: one.of(c, "inductor") for c in one.found},
        "flop_ideal": {c: one.ideal(c) for c in one.found},
        "compile_of_inductor": {c: one.compile_of_inductor(c) for c in COMPILED},
    }
    return {
        "model": one.name,
        "shapes": [[m, n, count] for (m, n), count in one.shapes.items()],
        "dtype": one.dtype,
        "iterate": one.iterate,
        "interleaved": one.interleaved,
        "measured_again": one.again,
        "seconds": {c: contender.seconds for c, contender in one.found.items()},
        "compile_seconds": {c: contender.compile_seconds for c, contender in one.found.items()},
        **{k: {c: r for c, r in some.items() if r is not None} for k, some in ratios.items()},
        "absent": one.absent,
        "notes": {c: contender.note for c, contender in one.found.items() if contender.note},
        "report": one.report.to_dict() if one.report is not None else None,
    }


def draw(done: Sequence[Measured], heading: str, options: argparse.Namespace) -> None:
    whole = "inductor" if "inductor" in options.only else "eager"
    names = [c for c in options.only if any(c in one.found for one in done) and c != whole]
    heights = {c: [one.over(whole, c) for one in done] for c in names}
    ideals = {
        c: [1 / ideal if (ideal := one.ideal(c)) else None for one in done]
        for c in names
        if c in OURS
    }
    label = f"times as fast as {'under Inductor' if whole == 'inductor' else 'eager'}"
    several = len(options.dtype) > 1
    groups = [f"{one.name} {one.iterate}" + f" of {one.dtype}" * several for one in done]
    bars.draw(heading, groups, heights, f"{label} (line: FLOP-ideal)", options.plot, ideals)


if __name__ == "__main__":
    raise SystemExit(main())
