"""What `moonfx bench attention` prints: a column is a title and what it says of a result.

A column that says the same of every result is said once, above the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tabulate import tabulate

from moonfx.bench.attention.cases import PASSES
from moonfx.bench.attention.results import Result, Run
from moonfx.bench.harness import machine
from moonfx.bench.harness.cells import milliseconds, number

MIB = 2**20


class Column(NamedTuple):
    title: str
    text: Callable[[Result], str]


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.0f}"


def per_token(result: Result) -> str:
    count, case = result.bytes.get("moonfx"), result.case
    return "-" if count is None else f"{count / case.length / case.batch:.0f}"


def time_of(name: str) -> Callable[[Result], str]:
    return lambda r: milliseconds(r.best(name))


SHAPE = [
    Column("batch", lambda r: str(r.case.batch)),
    Column("heads", lambda r: f"{r.case.heads}/{r.case.kv_heads}"),
    Column("block/topk/sinks", lambda r: f"{r.case.block}/{r.case.topk}/{r.case.sinks}"),
    Column("queries", lambda r: "N" if r.case.queries == r.case.length else str(r.case.queries)),
    Column("N", lambda r: str(r.case.length)),
    Column("D", lambda r: str(r.case.dim)),
    Column("dtype", lambda r: r.case.dtype),
    Column("pass", lambda r: r.case.work),
]
ALWAYS = ("N", "D", "dtype", "pass")
TIMES = [
    Column("dense ms", time_of("dense")),
    Column("moonfx ms", time_of("moonfx")),
    Column("speedup", lambda r: number(r.speedup, ".2f") + "x" * (r.speedup is not None)),
    Column("FLOP-ideal", lambda r: f"{r.case.flop_ideal:.2f}x"),
    Column("share", lambda r: number(r.flop_share, ".0%")),
]
ROOFS = [
    Column("byte-ideal", lambda r: number(r.byte_ideal, ".0f") + "x" * (r.byte_ideal is not None)),
    Column("share", lambda r: number(r.byte_share, ".0%")),
    Column("predicted ms", lambda r: milliseconds(r.prediction)),
    Column("share", lambda r: number(r.prediction_share, ".0%")),
]
RATE = [Column("TFLOP/s", lambda r: number(r.flop_rate and r.flop_rate / 1e12, ".0f"))]
MEMORY = [
    Column("dense MiB", lambda r: mebibytes(r.bytes.get("dense"))),
    Column("moonfx MiB", lambda r: mebibytes(r.bytes.get("moonfx"))),
    Column("peak", lambda r: number(r.memory, ".2f") + "x" * (r.memory is not None)),
    Column("B/token", per_token),
]
ALSO = {
    "flex": [
        Column("flex ms", time_of("flex")),
        Column("flex mask ms", lambda r: milliseconds(r.mask_seconds)),
    ],
    "reference": [Column("reference ms", time_of("reference"))],
}


def text(run: Run) -> str:
    """Machine, what all rows share, the table, and the lowest shares of the ideal."""
    also = {name for r in run.results for name in (*r.seconds, *r.absent)}
    gpu = any("TFLOP/s" in name for name in run.where)
    columns = [*TIMES, *ROOFS, *(RATE if gpu else []), *MEMORY]
    columns += [column for name in ALSO if name in also for column in ALSO[name]]
    parts = [machine.text(run.where)]
    parts.append(grid(run, columns, "simple") if run.results else "no case fits this machine")
    return "\n\n".join([*parts, "\n".join([*notes(run), *lowest(run)])]).rstrip()


def markdown(run: Run) -> str:
    """The table of docs/benchmarks.md: times and shares, and the memory that grows."""
    columns = [*TIMES, MEMORY[1], MEMORY[3]]
    names = ("hardware", "versions", "threads", "turns", "date", "warning")
    known = {name: words for name, words in run.where.items() if name in names}
    where = "; ".join(f"{name}: {words}" for name, words in known.items())
    return f"{where}.\n\n{grid(run, columns, 'github')}"


def prediction(run: Run, source: str) -> str:
    """Stage by stage; nothing in it was measured."""
    names = list(dict.fromkeys(name for r in run.results for name in r.predicted))
    columns = [Column("dense", lambda r: milliseconds(r.dense_predicted))]
    columns += [
        Column(name, lambda r, name=name: milliseconds(r.predicted.get(name)))  # type: ignore[misc]
        for name in names
    ]
    columns += [
        Column("moonfx", lambda r: milliseconds(r.prediction)),
        Column("speedup", lambda r: f"{r.dense_predicted / r.prediction:.2f}x"),
        Column("FLOP-ideal", lambda r: f"{r.case.flop_ideal:.2f}x"),
        Column("TFLOP/s", lambda r: f"{r.case.flops / r.prediction / 1e12:.0f}"),
    ]
    title = (
        f"PREDICTION, not a measurement: {source}. Milliseconds of a kernel that keeps to them; "
        "a real one takes longer, dense or sparse."
    )
    return f"{title}\n\n{grid(run, columns, 'simple')}"


def grid(run: Run, columns: list[Column], style: str) -> str:
    shape = [c for c in SHAPE if c.title in ALWAYS or len({c.text(r) for r in run.results}) > 1]
    shared = ", ".join(f"{c.title} {c.text(run.results[0])}" for c in SHAPE if c not in shape)
    rows: list[list[Any]] = [[c.text(r) for c in [*shape, *columns]] for r in run.results]
    align = ["right" if c.title in ("batch", "queries", "N", "D") else "left" for c in shape]
    align += ["right"] * len(columns)
    body = tabulate(
        rows,
        [c.title for c in [*shape, *columns]],
        tablefmt=style,
        colalign=align,
        disable_numparse=True,
    )
    return f"{shared}\n\n{body}"


def notes(run: Run) -> list[str]:
    """Cases and contenders that are not in the table, and why; each reason once."""
    reasons = {f"- {name}: {why}" for r in run.results for name, why in r.absent.items()}
    return sorted(reasons) + [f"left out: {line}" for line in run.left_out]


def lowest(run: Run) -> list[str]:
    lines = []
    for work in PASSES:
        shares = [r.flop_share for r in run.results if r.case.work == work and r.flop_share]
        if shares:
            lines.append(f"lowest share of the FLOP-ideal speedup, {work}: {min(shares):.0%}")
    return lines
