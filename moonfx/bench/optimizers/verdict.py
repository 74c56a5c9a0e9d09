"""Whether anything is slower than is allowed: the last line of the optimizers' benchmarks.

A best of few turns is noisy, so what fails is measured again: both sides take AGAIN times as many
turns more, one after the other, all of them whatever they show, and the best of all counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moonfx.bench.harness import machine

AGAIN = 3
ALLOWED = 1.03  # of what it is measured against, on each shape of the sweep


@dataclass(frozen=True)
class Judged:
    """One measurement: our time over the other's.

    Args:
        again: whether it took more turns. as_written: whether nothing was rewritten.
    """

    name: str
    ratio: float
    again: bool
    as_written: bool


@dataclass(frozen=True)
class Verdict:
    """Of all measurements; it is no pass where nothing could be measured.

    Args:
        left_out: how many could not be.
    """

    worst: Judged | None
    at_most: float
    shapes: int
    failed: int
    measured_again: int
    as_written: int
    left_out: int

    @property
    def passed(self) -> bool:
        return self.worst is not None and not self.failed

    def line(self, against: str, as_written: str) -> str:
        """One line.

        Args:
            against: what "times" are of. as_written: what holds where nothing was rewritten.
        """
        if self.worst is None:
            return "verdict: FAIL: nothing was measured"
        parts = [
            f"verdict: {'pass' if self.passed else 'FAIL'}: at worst {self.worst.ratio:.3f}x the "
            f"time of {against}, on {self.worst.name} (allowed: {self.at_most:g}x)",
            f"{self.failed} of {self.shapes} slower",
            f"{self.measured_again} measured again",
        ]
        if self.as_written:
            parts.append(f"{self.as_written} left as written, {as_written}")
        if self.left_out:
            parts.append(f"{self.left_out} left out")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judge(measured: Sequence[Judged], at_most: float, left_out: int = 0) -> Verdict:
    return Verdict(
        worst=max(measured, key=lambda one: one.ratio, default=None),
        at_most=at_most,
        shapes=len(measured),
        failed=sum(one.ratio > at_most for one in measured),
        measured_again=sum(one.again for one in measured),
        as_written=sum(one.as_written for one in measured),
        left_out=left_out,
    )


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: Mapping[str, list[float]],
    turns: int,
    device: torch.device,
) -> None:
    """Each call in turn, so often; a turn's time joins the call's `seconds`."""
    for _ in range(turns):
        for name, call in calls.items():
            seconds[name].append(machine.seconds(call, device))
