"""What `moonfx bench newton-schulz` found for a shape, and how it says and draws it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from moonfx.bench.harness.cells import milliseconds, number
from moonfx.bench.optimizers import bars
from moonfx.bench.optimizers import other_packages as others

FORMS = ("plain", "symmetric", "gram")


@dataclass
class Timing:
    """One shape.

    Args:
        form, why: what "auto" takes. as_written: whether that is the loop itself.
        seconds: of each turn, by contender: "loop", forms, packages of others.
        flop_ideal: by form.
        absent: why a contender takes no part. notes: in what one differs.
        again: whether what "auto" takes was measured again for the verdict.
    """

    m: int
    n: int
    count: int
    dtype: str
    form: str
    why: str
    as_written: bool
    flop_ideal: dict[str, float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    again: bool = False

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n} {self.dtype}"

    def best(self, name: str) -> float | None:
        return min(self.seconds[name]) if self.seconds.get(name) else None

    def speedup(self, name: str) -> float | None:
        ours, loop = self.best(name), self.best("loop")
        return None if ours is None or loop is None else loop / ours

    @property
    def ratio(self) -> float:
        """The time of what "auto" takes, over the loop's."""
        return 1.0 if self.as_written else 1 / (self.speedup(self.form) or 0.0)


def table(done: Sequence[Timing]) -> str:
    forms = [f for f in FORMS if any(f in t.seconds for t in done)]
    theirs = [name for name in others.NAMES if any(name in t.seconds for t in done)]
    rows = []
    for t in done:
        row = [f"{t.m}x{t.n}", t.count, t.dtype, milliseconds(t.best("loop"))]
        row += [f"{number(t.speedup(f))} of {t.flop_ideal[f]:.2f}" for f in forms]
        row += [number(t.speedup(name)) for name in theirs]
        taken = "as written" if t.as_written else f"{t.form}: {1 / t.ratio:.2f}x"
        rows.append([*row, taken + " (measured again)" * t.again])
    titles = ["X", "matrices", "dtype", "loop ms", *(f"{f} of FLOP-ideal" for f in forms)]
    titles += [*theirs, "auto"]
    align = ["left", "right", "left", *["right"] * (1 + len(forms) + len(theirs)), "left"]
    return tabulate(rows, titles, disable_numparse=True, colalign=align if rows else None)


def notes(done: Sequence[Timing], left_out: Sequence[str]) -> list[str]:
    """Who differs, who takes no part and why: each once."""
    lines = [f"- {others.version(k)}: {v}" for t in done for k, v in t.notes.items()]
    for name in others.NAMES:
        reasons: dict[str, list[str]] = {}
        for t in done:
            if name in t.absent:
                reasons.setdefault(t.absent[name], []).append(t.name)
        for reason, shapes in reasons.items():
            of = "" if len(shapes) == len(done) else f" of {', '.join(shapes)}"
            lines.append(f"- {name} is left out{of}: {reason}")
    return list(dict.fromkeys(lines)) + [f"- left out: {line}" for line in left_out]


def draw(done: Sequence[Timing], title: str, path: str) -> None:
    names = list(dict.fromkeys(name for t in done for name in t.seconds if name != "loop"))
    heights = {name: [t.speedup(name) for t in done] for name in names}
    ideals = {name: [t.flop_ideal[name] for t in done] for name in names if name in FORMS}
    label = "times as fast as the loop (line: FLOP-ideal)"
    bars.draw(title, [t.name for t in done], heights, label, path, ideals)
