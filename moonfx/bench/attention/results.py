"""What `moonfx bench attention` found, as data: to JSON and back."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moonfx.bench.attention.cases import Case


@dataclass(frozen=True)
class Result:
    """One case; the contenders by name, "dense" and "moonfx" among them.

    Args:
        seconds: of each turn. absent: why a contender has none.
        bytes: peak memory of a call beyond its inputs; None where it cannot be measured.
        input_bytes: of moonfx's tensors.
        byte_floor: seconds of a copy of the bytes that any kernel must move.
        predicted: seconds of each of moonfx's stages by the roofline; dense_predicted of dense.
        baseline: how dense was given grouped heads. mask_seconds: of building FlexAttention's mask.
    """

    case: Case
    byte_floor: float
    predicted: dict[str, float]
    dense_predicted: float
    input_bytes: int
    baseline: str = "-"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int | None] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    mask_seconds: float | None = None

    def best(self, name: str) -> float | None:
        return min(self.seconds[name]) if self.seconds.get(name) else None

    @property
    def speedup(self) -> float | None:
        return over(self.best("dense"), self.best("moonfx"))

    @property
    def flop_share(self) -> float | None:
        return over(self.speedup, self.case.flop_ideal)

    @property
    def byte_ideal(self) -> float | None:
        """The speedup if a call took no longer than a copy of what it must move."""
        return over(self.best("dense"), self.byte_floor)

    @property
    def byte_share(self) -> float | None:
        return over(self.byte_floor, self.best("moonfx"))

    @property
    def prediction(self) -> float:
        return sum(self.predicted.values())

    @property
    def prediction_share(self) -> float | None:
        """The predicted part of the time that was measured."""
        return over(self.prediction, self.best("moonfx"))

    @property
    def flop_rate(self) -> float | None:
        """FLOP/s of the selected products; the time has routing in it."""
        return over(self.case.flops, self.best("moonfx"))

    @property
    def memory(self) -> float | None:
        """moonfx's peak over dense's, both with moonfx's inputs."""
        dense, moonfx = (self.bytes.get(name) for name in ("dense", "moonfx"))
        if dense is None or moonfx is None:
            return None
        return (moonfx + self.input_bytes) / (dense + self.input_bytes)


DERIVED = (
    *("speedup", "flop_share", "byte_ideal", "byte_share", "prediction"),
    *("prediction_share", "flop_rate", "memory"),
)


@dataclass(frozen=True)
class Run:
    """Results of one machine. where: hardware and versions, by name. left_out: cases, and why."""

    where: dict[str, str]
    results: list[Result]
    left_out: list[str]

    def to_json(self) -> str:
        results = [
            asdict(r)
            | {"flop_ideal": r.case.flop_ideal}
            | {name: getattr(r, name) for name in DERIVED}
            for r in self.results
        ]
        written = {"where": self.where, "left_out": self.left_out, "results": results}
        return json.dumps(written, indent=1)


def read(paths: Sequence[str]) -> Run:
    """Files that `--json` wrote, of one machine, as one run.

    Raises:
        ValueError: if a file is not one, or if they are of different machines or versions.
    """
    runs = []
    for path in paths:
        try:
            runs.append(from_dict(json.loads(Path(path).read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--from must name what `moonfx bench attention --json` wrote, got {path}"
            ) from error
    first = runs[0].where
    for path, run in zip(paths, runs):
        for name in ("hardware", "versions"):
            if run.where.get(name) != first.get(name):
                raise ValueError(f"{path} has other {name}: {run.where.get(name)}")
    turns = dict.fromkeys(run.where["turns"] for run in runs if "turns" in run.where)
    if turns:
        first = first | {"turns": " or ".join(turns)}
    results = [result for run in runs for result in run.results]
    return Run(first, results, [line for run in runs for line in run.left_out])


def from_dict(written: dict[str, Any]) -> Run:
    names = Result.__dataclass_fields__
    results = [
        Result(**{k: v for k, v in r.items() if k in names} | {"case": Case(**r["case"])})
        for r in written["results"]
    ]
    return Run(written["where"], results, written["left_out"])


def over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole
