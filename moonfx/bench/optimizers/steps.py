"""Measures steps of Muon for `moonfx bench optimizer`: all contenders in turns."""

import argparse
import math
from dataclasses import dataclass, field

import torch

import moonfx
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.harness.machine import Absent
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers import verdict
from moonfx.bench.optimizers.matrices import Shapes
from moonfx.bench.optimizers.step_contenders import COMPILED, OURS, Contender, Setting
from moonfx.bench.optimizers.verdict import take_turns
from moonfx.ops.newton_schulz import newton_schulz_flops, newton_schulz_form


@dataclass
class Measured:
    """One model's step.

    Args:
        iterate: the dtype of Newton-Schulz. interleaved: whether the contenders took turns.
        absent: why a contender takes no part. share: of the FLOPs as written that remain.
        again: whether moonfx was measured again for the verdict.
    """

    name: str
    shapes: Shapes
    dtype: str
    iterate: str
    share: float
    interleaved: bool
    found: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    report: moonfx.Report | None = None
    again: bool = False

    def over(self, whole: str, part: str) -> float | None:
        """How many times the time of `part` is in that of `whole`."""
        if whole not in self.found or part not in self.found:
            return None
        return self.found[whole].best / self.found[part].best

    def of(self, name: str, other: str) -> float | None:
        """The share of `other`'s time that `name` takes."""
        ratio = self.over(other, name)
        return None if ratio is None else 1 / ratio

    def compile_of_inductor(self, name: str) -> float | None:
        if not {name, "inductor"} <= set(self.found) or not self.found[name].compiled:
            return None
        inductor = self.found["inductor"].compile_seconds
        return self.found[name].compile_seconds / inductor if inductor else None

    def ideal(self, name: str) -> float | None:
        """The share of eager's time, if FLOPs were all there is to it."""
        return self.share if name in OURS else None if name in others.NAMES else 1.0


def measure(
    name: str, shapes: Shapes, dtype: str, iterate: str, options: argparse.Namespace, apart: bool
) -> Measured:
    """Times each contender.

    Args:
        apart: one after another, and only one of them in memory.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    share = share_of_flops(shapes, iterate, options.steps, device)
    measured = Measured(name, shapes, dtype, iterate, share, not apart)
    setting = Setting.make(shapes, dtype, iterate, options, device)
    compiled = [name for name in options.only if name in COMPILED]
    earlier: dict[str, list[float]] = {name: [] for name in options.only}
    for _ in range(options.compiles - 1):
        for contender in compiled:
            torch.compiler.reset()
            one = setting.first_steps(contender)
            earlier[contender].append(one.compile_seconds)
            forget(one)
    torch.compiler.reset()
    for contender in options.only:
        try:
            measured.found[contender] = setting.first_steps(contender)
        except Absent as reason:
            measured.absent[contender] = str(reason)
            continue
        if contender == "moonfx":
            measured.report = moonfx.report(measured.found[contender].muon)
        if apart:
            turns(measured, [contender], options.repeats, device)
            forget(measured.found[contender])
    if not apart:
        turns(measured, list(measured.found), options.repeats, device)
        ratio = measured.of("moonfx", "inductor")
        if options.at_most and ratio is not None and ratio > options.at_most:
            turns(measured, list(COMPILED), verdict.AGAIN * options.repeats, device)
            measured.again = True
    for contender, one in measured.found.items():
        spent = min(one.compile_seconds, *earlier[contender], math.inf)
        one.compile_seconds = max(0.0, spent - 2 * one.best)
    return measured


def turns(measured: Measured, names: list[str], count: int, device: torch.device) -> None:
    calls = {name: measured.found[name].run for name in names}
    seconds = {name: measured.found[name].seconds for name in names}
    take_turns(calls, seconds, count, device)


def forget(contender: Contender) -> None:
    """Frees a contender's momentum and its graphs; its times stay."""
    contender.steps = []
    contender.muon.state.clear()
    torch.compiler.reset()


def share_of_flops(shapes: Shapes, iterate: str, steps: int, device: torch.device) -> float:
    """Of Newton-Schulz's FLOPs, what the operator's choice of forms leaves."""
    dtype = DTYPES[iterate]
    written = left = 0
    for (m, n), count in shapes.items():
        form, _ = newton_schulz_form(device, dtype, count, m, n, steps)
        written += count * newton_schulz_flops(m, n, steps)
        left += count * newton_schulz_flops(m, n, steps, form, dtype)
    return left / written
