"""Rows of the report for Newton-Schulz iterations: found, how computed, and what that saves."""

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from moonfx.ops.newton_schulz import newton_schulz_flops
from moonfx.site import NewtonSchulzSite


@dataclass(frozen=True)
class IterationRow:
    """The iterations of one graph that are alike: written in one line, on matrices of one size.

    Args:
        layer, line: module name and source line.
        shape, dtype, device: of one X, a batch of matrices included.
        count: how many iterations.
        calls: how many calls of the operator compute them.
        shared: how many of these compute iterations of a row before this one, too.
        steps: k of X_0 -> X_k.
        coefficients: (a, b, c) of each step.
        action: "rewritten", "left" where the cost model keeps what was written, or "declined".
        form: the operator's form, "" if it is not used.
        reason: why the cost model chose so, or why they were declined.
        flops_before, flops_after: of all their products, as written and as computed now; 0 where
            they were declined.
        node: what stands in the way of the first that was declined, "" for none.
    """

    layer: str
    line: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    count: int
    calls: int
    steps: int
    coefficients: tuple[tuple[float, float, float], ...]
    action: str
    form: str
    reason: str
    flops_before: int
    flops_after: int
    shared: int = 0
    node: str = field(default="", compare=False)


def rows_of(sites: Iterable[NewtonSchulzSite]) -> list[IterationRow]:
    """The sites of one graph as they stand after the passes."""
    found: dict[IterationRow, list[NewtonSchulzSite]] = {}
    for site in sites:
        found.setdefault(_alone(site), []).append(site)
    rows, seen = [], set[int | None]([None])
    for row, group in found.items():
        calls = {site.call for site in group}
        rows.append(
            replace(
                row,
                count=len(group),
                calls=len(calls - {None}),
                shared=len(calls & seen - {None}),
                flops_before=row.flops_before * len(group),
                flops_after=row.flops_after * len(group),
            )
        )
        seen |= calls
    return rows


def _alone(site: NewtonSchulzSite) -> IterationRow:
    declined = site.reject is not None
    after = 0 if declined else site.flops
    if site.form:
        *batch, m, n = site.shape
        steps = site.coefficients
        one = newton_schulz_flops(m, n, len(steps), site.form, site.dtype, steps)
        after = math.prod(batch) * one
    reason = site.reject.reason if site.reject is not None else site.why
    return IterationRow(
        layer=site.layer,
        line=site.line,
        shape=site.shape,
        dtype=str(site.dtype).removeprefix("torch."),
        device=str(site.device),
        count=1,
        calls=1,
        steps=len(site.coefficients),
        coefficients=tuple(site.coefficients),
        action="declined" if declined else site.action,
        form=site.form,
        reason=reason,
        flops_before=site.flops,
        flops_after=after,
        node=site.reject.node.name if site.reject is not None else "",
    )


def merge_recompiled(*compiled: Iterable[IterationRow]) -> list[IterationRow]:
    """The rows of code that was compiled several times and runs as one of them: the larger ones."""
    found: dict[IterationRow, IterationRow] = {}
    for row in itertools.chain(*compiled):
        known = found.setdefault(_kind(row), row)
        found[_kind(row)] = max(known, row, key=operator.attrgetter("count"))
    return list(found.values())


def sum_pieces(pieces: Iterable[Iterable[IterationRow]]) -> list[IterationRow]:
    """The rows of the pieces of one step, those alike added up."""
    found: dict[IterationRow, IterationRow] = {}
    for row in itertools.chain(*pieces):
        known = found.get(_kind(row), _kind(row))
        sums = {name: getattr(known, name) + getattr(row, name) for name in _COUNTED}
        found[_kind(row)] = replace(row, **sums)
    return list(found.values())


_COUNTED = ("count", "calls", "shared", "flops_before", "flops_after")


def _kind(row: IterationRow) -> IterationRow:
    return replace(row, count=0, calls=0, shared=0, flops_before=0, flops_after=0)


def table(rows: Sequence[IterationRow]) -> str:
    columns: dict[str, list[Any]] = {
        "layer": [r.layer for r in rows],
        "line": [r.line for r in rows],
        "X": ["x".join(map(str, r.shape)) for r in rows],
        "dtype": [r.dtype for r in rows],
        "iterations": [r.count for r in rows],
        "steps": [r.steps for r in rows],
        "a, b, c": [_coefficients(r) for r in rows],
        "action": [r.action for r in rows],
        "calls": [_calls(r) for r in rows],
        "form, and why": [_why(r) for r in rows],
        "GFLOP before": [_giga(r.flops_before) for r in rows],
        "after": [_giga(r.flops_after) for r in rows],
    }
    if not any(columns["layer"]):
        del columns["layer"]
    if len({row.coefficients for row in rows}) == 1:
        del columns["a, b, c"]
    widths = [50 if name == "form, and why" else None for name in columns]
    return tabulate(columns, headers="keys", maxcolwidths=widths, disable_numparse=True)


def _coefficients(row: IterationRow) -> str:
    """Those of the first step."""
    first = ", ".join(f"{number:.5g}" for number in row.coefficients[0]) if row.steps else ""
    return f"{first} .." if len(set(row.coefficients)) > 1 else first


def _calls(row: IterationRow) -> str:
    if row.shared:
        return f"{row.calls} ({row.shared} shared)"
    return str(row.calls or "-")


def _why(row: IterationRow) -> str:
    if not row.node:
        return ": ".join(filter(None, (row.form, row.reason)))
    return f"{row.reason} (node {row.node}{f', the first of {row.count}' * (row.count > 1)})"


def footer(rows: Sequence[IterationRow], graphs: int, pieces: int) -> str:
    """What was found, and what became of it.

    Args:
        graphs: how many were compiled.
        pieces: how many of them are not of code that was compiled before.
    """

    def count(action: str) -> int:
        return sum(r.count for r in rows if r.action == action)

    calls = sum(r.calls - r.shared for r in rows)
    before, after = (sum(getattr(r, f"flops_{x}") for r in rows) for x in ("before", "after"))
    anew = f", compiled {graphs} times" if graphs > pieces else ""
    saved = f"; their products cost {after / before:.2f}x the FLOPs written" if before else ""
    return (
        f"{sum(r.count for r in rows)} Newton-Schulz iterations in {pieces} graph(s){anew}: "
        f"{count('rewritten')} rewritten to {calls} calls, {count('left')} "
        f"left as written, {count('declined')} declined{saved}"
    )


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g}" if flops else "-"
