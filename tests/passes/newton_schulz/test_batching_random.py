"""Random steps of iterations, writes, draws and modes: equal values, in as few calls as may be."""

import contextlib
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import CHANGING, normalized
from tests.support.newton_schulz.programs import Program, assert_computes_the_same, iterate

GIVEN = 4
MODES = (contextlib.nullcontext, torch.no_grad, torch.enable_grad)
KINDS = ("orthogonal", "update", "write", "draw", "view", "new")
WEIGHTS = (4, 4, 2, 2, 1, 1)
FEW = CHANGING[:1]  # steps


@dataclass(frozen=True)
class Line:
    """One line of a program: what it does to which tensors, in which mode."""

    kind: str
    x: int
    y: int
    mode: int


def lines(seed: int) -> list[Line]:
    """A program with 3 to 8 iterations."""
    choose, found, tensors = random.Random(seed), list[Line](), GIVEN
    wanted = choose.randint(3, 8)
    while sum(line.kind in ("orthogonal", "update") for line in found) < wanted:
        (kind,) = choose.choices(KINDS, WEIGHTS)
        x, y = choose.randrange(tensors), choose.randrange(tensors)
        (mode,) = choose.choices(range(3), (3, 3, 1))
        found.append(Line(kind, x, y, mode))
        tensors += kind in ("orthogonal", "view", "new")
    return found


def program(written: list[Line]) -> Program:
    def run(*given: Tensor) -> list[Tensor]:
        pool = list(given)
        for line in written:
            x, y = pool[line.x], pool[line.y]
            with MODES[line.mode]():
                match line.kind:
                    case "orthogonal":
                        pool.append(iterate(normalized(x), FEW) * 1.5)
                    case "update":
                        y.mul_(0.9).add_(iterate(normalized(x), FEW))
                    case "write":
                        y.add_(x, alpha=0.3)
                    case "draw":
                        y.add_(torch.normal(x, 0.1), alpha=0.3)
                    case "view":
                        pool.append(x.view(x.shape))
                    case "new":
                        pool.append(x + 0.5 * y)
        return [x * 1 for x in pool]

    return run


@dataclass
class Depths:
    """How many calls must follow one another before each memory is what it is.

    Args:
        written, read: of each memory: before its last write, and before all reads since.
        drawn: before the last random number.
    """

    memory: list[int] = field(default_factory=lambda: list(range(GIVEN)))
    written: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(GIVEN), 0))
    read: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(GIVEN), 0))
    drawn: int = 0

    def reads(self, *tensors: int, least: int = 0) -> int:
        own = max(least, *(self.written[self.memory[x]] for x in tensors))
        for x in tensors:
            self.read[self.memory[x]] = max(self.read[self.memory[x]], own)
        return own

    def before_writing(self, tensor: int) -> int:
        where = self.memory[tensor]
        return max(self.written[where], self.read[where])

    def writes(self, tensor: int, depth: int = 0) -> None:
        where = self.memory[tensor]
        self.written[where] = max(self.before_writing(tensor), depth)
        self.read[where] = 0

    def makes(self, depth: int) -> None:
        self.memory.append(len(self.memory))
        self.written[self.memory[-1]], self.read[self.memory[-1]] = depth, 0


def calls_needed(written: list[Line]) -> tuple[int, int]:
    """How many iterations may be rewritten, and how few calls they can share."""
    now, at = Depths(), list[int]()
    for line in written:
        match line.kind:
            case "update" | "orthogonal":
                if line.kind == "update":
                    now.writes(line.y)
                depth = now.reads(line.x)
                if MODES[line.mode] is not torch.enable_grad:  # what is given may need a gradient
                    at.append(depth)
                    depth += 1
                now.writes(line.y, depth) if line.kind == "update" else now.makes(depth)
            case "write":
                now.writes(line.y, now.reads(line.x, least=now.before_writing(line.y)))
            case "draw":
                now.drawn = now.reads(line.x, least=now.drawn)
                now.writes(line.y, now.drawn)
            case "view":
                now.memory.append(now.memory[line.x])
            case "new":
                now.makes(now.reads(line.x, line.y))
    return len(at), len(set(at))


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(s, marks=pytest.mark.sweep) for s in range(10, 60))]
)
def test_random_steps_keep_their_values_in_as_few_calls_as_they_can(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    written = lines(seed)
    given = [matrix(4, 6, seed=i) for i in range(GIVEN)]
    rewritten = Rewritten(program(written), *given)
    # Several iterations one after another: each makes of a rounding up to 4 times as much.
    assert_computes_the_same(program(written), rewritten, given, tolerance=1e-3)
    assert (rewritten.count, len(rewritten.calls)) == calls_needed(written)


def test_the_random_steps_are_of_every_kind() -> None:
    needed = [calls_needed(lines(seed)) for seed in range(10)]
    assert {line.kind for seed in range(10) for line in lines(seed)} == set(KINDS)
    assert any(calls < count for count, calls in needed)
    assert any(calls > 1 for _, calls in needed)
