"""What became of each compiled graph, and the reports made of it."""

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch

from moonfx.passes.parameters.dataflow import DataFlow
from moonfx.passes.parameters.roles import Found, uses_in
from moonfx.report.attention import Row
from moonfx.report.newton_schulz import IterationRow
from moonfx.report.report import Report
from moonfx.verdicts import Lost


@dataclass(eq=False)
class Record:
    """One compiled graph.

    Args:
        rows: its attentions.
        failure: what runs as it was because something failed, and why.
        parameters: those that it reads.
        of_optimizer: whether it is of an optimizer's step: it holds its parameters itself, or an
            optimizer's method called it, and no module's; or, where neither did, it has
            Newton-Schulz iterations and writes to parameters that it is given.
        iterations: those.
        optimizer: whose step it is, where that is known.
        frame: a number for the code that it was compiled from.
        broken: where and why a graph break cut it off from what follows.
        disabled: the passes that did not run, as its owner asked.
        lost: those that were sparse in other graphs and are not in this one.
        overruled: why it no longer runs, and the graph as it was written does; "" while it does.
        run: of a model's graph, what it computed before the passes; `uses` reads it and lets it go.
    """

    rows: list[Row]
    failure: str | None
    parameters: list[weakref.ref[torch.Tensor]]
    of_optimizer: bool = False
    iterations: list[IterationRow] = field(default_factory=list)
    run: DataFlow | None = None
    found: dict[int, Found] = field(default_factory=dict)
    optimizer: weakref.ref[torch.optim.Optimizer] | None = None
    frame: int | None = None
    broken: str | None = None
    disabled: tuple[str, ...] = ()
    lost: list[Lost] = field(default_factory=list)
    overruled: str = ""

    @property
    def code(self) -> Hashable:
        """The same for graphs that the same code was compiled to, for the same parameters."""
        same = id(self) if self.frame is None else self.frame
        return same, id(self.optimizer), frozenset(map(id, self.parameters))

    def of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is known to be of this optimizer's step."""
        return self.optimizer is not None and self.optimizer() is optimizer

    @property
    def is_used(self) -> bool:
        """Whether what it is of still lives."""
        of_optimizer = self.optimizer is not None and self.optimizer() is not None
        return of_optimizer or any(p() is not None for p in self.parameters)

    def uses(self, names: dict[int, str]) -> dict[int, Found]:
        """What the graph uses each parameter that still lives for, by its id.

        Args:
            names: id of each module of the model -> its qualified name.
        """
        if self.run is not None:
            self.found, self.run = uses_in(self.run, names), None
        alive = {id(p()) for p in self.parameters if p() is not None}
        return {key: found for key, found in self.found.items() if key in alive}


def report_on(records: Iterable[Record]) -> Report:
    """The report of some compiled graphs."""
    report = Report(of_steps=True)
    for record in records:
        report.of_steps &= record.of_optimizer
        report.add(record.rows, record.iterations, record.code)
        report.failures += [record.failure] if record.failure else []
        report.disabled = tuple(sorted({*report.disabled, *record.disabled}))
    return report


_records: list[Record] = []


def remember(records: Iterable[Record]) -> None:
    """Keeps records of backend "moonfx" for as long as what they are of lives."""
    _records[:] = [*(r for r in _records if r.is_used), *records]


def records_of_step(optimizer: torch.optim.Optimizer) -> list[Record]:
    """The graphs that are known to be of this optimizer's step."""
    return [record for record in _records if record.of(optimizer)]


def records_of(parameters: Iterable[torch.Tensor]) -> list[Record]:
    """The models' graphs compiled by backend "moonfx" that used any of these parameters."""
    ids = {id(p) for p in parameters}
    used = (r for r in _records if any(id(p()) in ids for p in r.parameters))
    return [record for record in used if not record.of_optimizer]


def report_of(parameters: Iterable[torch.Tensor] | None) -> Report | None:
    """What backend "moonfx" did to the models' graphs that used any of these parameters.

    Args:
        parameters: None for all graphs, optimizers' too.
    """
    found = _records if parameters is None else records_of(parameters)
    return report_on(found) if found else None


def report_of_step(optimizer: torch.optim.Optimizer) -> Report | None:
    """What backend "moonfx" did to an optimizer's step, or to one that it wraps."""
    own = records_of_step(optimizer)
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    same = (r for r in _records if any(id(p()) in ids for p in r.parameters))
    found = own or [r for r in same if r.of_optimizer]
    return report_on(found) if found else None
