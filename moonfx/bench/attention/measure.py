"""Measures one case: all contenders in turns, after a warm-up each, which also shows its memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moonfx.bench.attention import contenders, counts, roofline
from moonfx.bench.attention.cases import Case
from moonfx.bench.attention.ceilings import Ceilings
from moonfx.bench.attention.contenders import BASELINES, Inputs
from moonfx.bench.attention.flex import flex
from moonfx.bench.attention.results import Result
from moonfx.bench.harness import machine
from moonfx.bench.harness.machine import Absent

LONG = 10.0  # seconds: a warm-up that takes longer is a turn as well


@dataclass(frozen=True)
class Limits:
    """How often, and what is too much.

    Args:
        also: contenders beside dense and moonfx. reference_up_to: tokens. patience: seconds that a
            call may be predicted to take. dense: its backend, one of contenders.BACKENDS or "auto".
    """

    repeats: int
    also: tuple[str, ...] = ()
    reference_up_to: int = 4096
    patience: float = 300.0
    dense: str = "auto"


def predicted(case: Case, ceilings: Ceilings) -> Result:
    """What can be said of a case without running it."""
    size = counts.sizes(case)
    inputs = size.query * (1 + case.backward) + 2 * size.key + size.means * case.means
    return Result(
        case,
        counts.compulsory_bytes(case) / ceilings.copy,
        roofline.predict(case, ceilings),
        roofline.predict_dense(case, ceilings),
        inputs,
    )


def predicted_anew(result: Result, ceilings: Ceilings) -> Result:
    """The same result beside what other ceilings predict."""
    fresh = predicted(result.case, ceilings)
    return replace(
        result,
        byte_floor=fresh.byte_floor,
        predicted=fresh.predicted,
        dense_predicted=fresh.dense_predicted,
    )


def does_not_fit(case: Case, free: int) -> str | None:
    """Why a case cannot be measured here, if so; `free` bytes are left."""
    needed = counts.needed_bytes(case, expanded=False)
    if needed <= free:
        return None
    return f"{case}: needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def measure(case: Case, device: torch.device, ceilings: Ceilings, limits: Limits) -> Result:
    expected = predicted(case, ceilings)
    baseline, calls, absent, building = prepare(case, device, expected, limits)
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name, call in list(calls.items()):
        try:
            seconds[name], peaks[name] = warm_up(call, device)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
            del calls[name]
            torch.cuda.empty_cache()
    for turn in range(limits.repeats):
        for name, call in calls.items():
            if len(seconds[name]) <= turn:
                seconds[name].append(machine.seconds(call, device))
    return replace(
        expected,
        baseline=baseline,
        seconds=seconds,
        bytes=peaks,
        absent=absent,
        mask_seconds=machine.seconds(building, device) if building and "flex" in calls else None,
    )


def prepare(
    case: Case, device: torch.device, expected: Result, limits: Limits
) -> tuple[str, dict[str, Callable[[], object]], dict[str, str], Callable[[], object] | None]:
    """The baseline, the calls, why a contender has none, and what builds FlexAttention's mask."""
    given = contenders.inputs(case, device)
    baseline, building = "-", None
    calls: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    for name in ("dense", "moonfx", *limits.also):
        try:
            wait = expected.prediction if name == "moonfx" else expected.dense_predicted
            if wait > limits.patience:
                raise Absent(f"predicted {wait:,.0f} s, over --patience {limits.patience:,.0f}")
            if name == "dense":
                baseline = faster_baseline(case, device, limits.dense)
                calls[name] = contenders.dense(case, given, baseline, limits.dense)
            elif name == "moonfx":
                calls[name] = contenders.moonfx(case, given)
            elif name == "flex":
                calls[name], building = flex(case, given)
            else:
                calls[name] = contenders.by_definition(case, given, limits.reference_up_to)
        except Absent as reason:
            absent[name] = str(reason)
    return baseline, calls, absent, building


def warm_up(call: Callable[[], object], device: torch.device) -> tuple[list[float], int | None]:
    start = time.perf_counter()
    peak = machine.peak_bytes(call, device)
    spent = time.perf_counter() - start
    return [spent] if spent > LONG else [], peak


def faster_baseline(case: Case, device: torch.device, backend: str) -> str:
    """The faster of BASELINES at a quarter of the length, if expanded heads fit at the whole."""
    if case.heads == case.kv_heads:
        return "expanded"
    if counts.needed_bytes(case, expanded=True) > machine.free_bytes(device):
        return "enable_gqa"
    length = max(1, case.length // 4)
    short = replace(case, length=length, queries=min(case.queries, length), means=False)
    given: Inputs = contenders.inputs(short, device)
    calls = {name: contenders.dense(short, given, name, backend) for name in BASELINES}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            times[name].append(machine.seconds(call, device))
    return min(times, key=lambda name: min(times[name]))
