"""What `moonfx bench optimizer` prints: a table for each model, or one of all shapes, and notes."""

import argparse
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from moonfx.bench.harness import machine
from moonfx.bench.harness.cells import number
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers.step_contenders import CONTENDERS
from moonfx.bench.optimizers.steps import Measured
from moonfx.bench.optimizers.verdict import Verdict


def text(
    where: Mapping[str, str],
    options: argparse.Namespace,
    done: Sequence[Measured],
    left_out: Sequence[str],
    verdict: Verdict | None,
) -> str:
    parts = [machine.text(where)]
    parts[0] += f"\n{options.steps} steps, best of {options.repeats}"
    if options.each and done:
        parts += [each_table(done) + notes(done)]
    for one in done if not options.each else []:
        parts += [title(one), table(one) + notes([one])]
        parts += [str(one.report)] if one.report is not None else []
    parts += ["\n".join(f"left out: {line}" for line in left_out)] if left_out else []
    parts += [verdict.line("Inductor's step", "measured all the same")] if verdict else []
    return "\n\n".join(parts)


def title(one: Measured) -> str:
    return f"{one.name}, parameters {one.dtype}, Newton-Schulz {one.iterate}"


def left_as_written(one: Measured) -> bool:
    return one.report is not None and not any(r.form for r in one.report.iterations)


def table(one: Measured) -> str:
    rows = [
        [
            name,
            f"{contender.best * 1e3:.1f}",
            *(number(one.of(name, whole)) for whole in ("eager", "inductor")),
            number(one.ideal(name)),
            f"{contender.compile_seconds:.1f}" if contender.compiled else "-",
            number(one.compile_of_inductor(name)),
        ]
        for name, contender in one.found.items()
    ]
    titles = ["step", "ms", "of eager's time", "of Inductor's", "FLOP-ideal", "compile s"]
    titles += ["of Inductor's"]
    return tabulate(rows, titles, disable_numparse=True, colalign=["left", *["right"] * 6])


def each_table(done: Sequence[Measured]) -> str:
    """A row for each shape: what is compared, and what became of the iterations."""
    beside = [c for c in CONTENDERS if c != "inductor" and any(c in r.found for r in done)]
    rows = []
    for one in done:
        inductor = one.found.get("inductor")
        row = [one.name, str(sum(one.shapes.values())), one.dtype, one.iterate]
        row.append(f"{inductor.best * 1e3:.3f}" if inductor else "-")
        row += [number(one.of(c, "inductor")) for c in beside]
        row += [number(one.share), number(one.compile_of_inductor("moonfx"))]
        forms = [] if one.report is None else [r.form or r.action for r in one.report.iterations]
        rows.append([*row, ", ".join(dict.fromkeys(forms)) + " (measured again)" * one.again])
    titles = ["X", "matrices", "parameters", "Newton-Schulz", "Inductor ms"]
    titles += [f"{c}, of that" for c in beside]
    titles += ["FLOP-ideal", "compile, of Inductor's", "moonfx took"]
    align = ["left", "right", "left", "left", *["right"] * (3 + len(beside)), "left"]
    return tabulate(rows, titles, disable_numparse=True, colalign=align)


def notes(done: Sequence[Measured]) -> str:
    """Who differs, who takes no part and why, what was not interleaved: a line each, once."""
    lines = []
    for one in done:
        lines += [f"- {others.version(c)}: {r.note}" for c, r in one.found.items() if r.note]
        lines += [f"- {c} is left out: {reason}" for c, reason in one.absent.items()]
        lines += [] if one.interleaved else [APART]
    return "".join(f"\n{line}" for line in dict.fromkeys(lines))


APART = "- measured one after another, not in turns: memory does not hold all at once"
