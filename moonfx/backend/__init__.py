"""The Dynamo backend "moonfx": capture, passes, and on to an inner compiler.

torch.compile(model, backend="moonfx", options={"block": 4096, "topk": 12})
torch.compile(muon.step, backend="moonfx")
"""

import difflib
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import moonfx.ops  # noqa: F401  (registers the operators that the passes emit)
from moonfx.backend import on_miss as steps
from moonfx.backend.guards import Values, checked
from moonfx.capture import (
    COMPILERS,
    CaptureError,
    break_after,
    capture,
    capture_exported,
    compile_graph,
    compiled_frame,
    exported_again,
    graph_root,
    held_tensors,
    is_decomposed,
    is_left_out,
    is_piece,
    mode_options,
    name_invoked_bodies,
    owner,
    returns_gradients,
)
from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.parameters.dataflow import DataFlow, GraphCall
from moonfx.passes.parameters.roles import Found, uses_in
from moonfx.passes.pass_manager import WITHOUT_ATTENTION, Passes, run_passes
from moonfx.passes.symbolic import input_masks as given_masks
from moonfx.policy import LayerPolicy, Policies, check_flag
from moonfx.report import Report, Row, row_of
from moonfx.report.newton_schulz import IterationRow, rows_of
from moonfx.site import AttentionSite

log = logging.getLogger("moonfx.backend")

ON_MISS = ("warn", "raise", "ignore")


class NothingRewritten(RuntimeError):
    """No attention became sparse, no iteration is proved, although on_miss="raise"."""


@dataclass
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
    return report


class DenseLastUnknown(ValueError):
    """dense_last with a model that is compiled in pieces."""


class Backend:
    """Compiles the graphs of one model under one set of policies.

    Args:
        policies: what each layer becomes; None leaves every graph as it is.
        compiler: one of COMPILERS.
        model: the model whose graphs these are, where it is known.
        config: Inductor options to pass on.
    """

    def __init__(
        self,
        policies: Policies | None,
        compiler: str = "inductor",
        model: torch.nn.Module | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.policies, self.compiler = policies, compiler
        self.config = config or {}
        self.names: dict[int, str] = {}
        self.parameter_names: dict[int, str] = {}
        self.left_out: list[str] = []
        if model is not None:
            self.names = {id(module): name for name, module in model.named_modules()}
            self.parameter_names = {id(p): name for name, p in model.named_parameters()}
            self.left_out = [
                f"{name or type(module).__name__} is under torch.compiler.disable"
                for name, module in model.named_modules()
                if is_left_out(module)
            ]
        self.records: list[Record] = []
        self.layers: list[tuple[str, int]] = []

    @property
    def report(self) -> Report:
        return self.report_on(self.records)

    def report_on(self, records: Iterable[Record]) -> Report:
        """The report of some graphs of this model, and what Dynamo was told to leave out."""
        report = report_on(records)
        report.failures += self.left_out
        return report

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles one graph; called by Dynamo."""
        graph, guards = self.rewrite(gm, example_inputs)
        stamp = f"{self.policies}"
        compiled = compile_graph(graph, example_inputs, self.compiler, stamp, self.config)
        if not guards:
            return compiled
        record = self.records[-1]

        def note(what: str) -> None:
            record.failure = what

        return checked(compiled, guards, gm.forward, note)

    def rewrite(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[fx.GraphModule, dict[int, Values]]:
        """Captures and rewrites one graph and records what happened.

        Returns:
            The graph to compile, the given one if nothing in it was rewritten; and, for the inputs
            (buffers and masks) whose values a proof rests on, what they were: position -> values.
        """
        if self.policies is None:
            return gm, {}
        held = held_tensors(gm).values()
        inputs = (x for x in (*example_inputs, *held) if isinstance(x, torch.nn.Parameter))
        parameters: list[weakref.ref[torch.Tensor]] = [weakref.ref(x) for x in inputs]
        called_by = owner()
        record = Record([], None, parameters, of_optimizer=bool(held))
        record.frame, record.broken = compiled_frame(), break_after(gm)
        if isinstance(called_by, torch.optim.Optimizer):
            record.optimizer, record.of_optimizer = weakref.ref(called_by), True
        self.records.append(record)
        try:
            captured = capture(gm, example_inputs)
        except CaptureError as error:
            record.failure = f"not captured, runs as it was: {error}"
            log.warning("a graph could not be captured and runs as it was: %s", error)
            return gm, {}
        if not held and returns_gradients(gm):  # of a closure, which the step calls
            record.optimizer, record.of_optimizer = None, False
        if parameters and not record.of_optimizer:
            self._remember(gm, captured, example_inputs, record)
        given_masks.mark(captured, example_inputs)
        root = graph_root(gm, example_inputs, self.parameter_names)
        context = self.run_passes(captured, root, record)
        if record.failure is not None and context is None:  # of a graph that may be half rewritten
            captured = capture(gm, example_inputs)
            context = self.run_passes(captured, root, record, WITHOUT_ATTENTION)
        if called_by is None and record.iterations:
            record.of_optimizer = record.of_optimizer or _writes_to_parameters(
                captured, example_inputs
            )
        if record.of_optimizer:
            record.run = None
        if context is None:
            return gm, {}
        name_invoked_bodies(captured, retraced=True)
        placeholders = [n for n in captured.graph.nodes if n.op == "placeholder"]
        guards = {
            placeholders.index(node): values
            for node, values in context.proofs.items()
            if node in placeholders
        }
        return captured, guards

    def _remember(
        self,
        gm: fx.GraphModule,
        captured: fx.GraphModule,
        example_inputs: Sequence[Any],
        record: Record,
    ) -> None:
        """Keeps what `Record.uses` needs; not the graph."""
        try:
            returned = () if is_piece(gm) else None
            record.run = DataFlow([GraphCall(captured, example_inputs)], returned)
        except Exception:
            if os.environ.get("MOONFX_VERIFY"):
                raise
            log.exception("the uses of a graph's parameters stay unknown; please report this")

    def rewrite_exported(self, program: ExportedProgram) -> ExportedProgram:
        """A new program with what the policies make sparse; the given one stays as it is.

        What was proved of a buffer's values was proved of those that the program holds.
        """
        record = Record([], None, [])
        self.records.append(record)
        exported = capture_exported(program)
        if self.run_passes(exported.gm, "", record) is None:
            exported = capture_exported(program)
        if is_decomposed(program):
            hint = "; the program was decomposed: give the one before run_decompositions()"
            record.rows = [
                replace(row, reason=row.reason + hint) if row.action == "declined" else row
                for row in record.rows
            ]
        return exported_again(exported)

    def run_passes(
        self,
        captured: fx.GraphModule,
        root: str | None,
        record: Record,
        *passes: Passes,
    ) -> Context | None:
        """Runs passes on a captured graph and records what they found.

        Args:
            passes: a tuple of them, if not all of them.
        Returns:
            None if nothing was rewritten.
        """
        assert self.policies is not None
        flags = self.policies.causal_only, self.policies.recompute_routing
        context = Context(captured, self.policy_of, self.names, root, *flags)
        try:
            rewritten = run_passes(context, *passes)
        except DenseLastUnknown:
            raise
        except Exception as error:
            if os.environ.get("MOONFX_VERIFY"):
                raise
            failure = f"a pass failed, attentions stay: {type(error).__name__}: {error}"
            record.failure = record.failure or failure
            log.exception("a pass failed, and the graph's attentions stay; please report this")
            return None
        apart = [f"a pass failed, what the others did stays: {f}" for f in context.failures]
        record.failure = "\n".join(filter(None, [record.failure, *apart])) or None
        record.rows += map(row_of, context.sites)
        record.iterations = rows_of(context.iterations)
        return context if rewritten else None

    def policy_of(
        self, site: AttentionSite, sites: list[AttentionSite], root: str | None
    ) -> LayerPolicy | str:
        """A site's policy, or why it stays dense.

        Args:
            sites: all attentions of its graph, in order.
            root: the module that the graph starts in, "" for the model, None if that is not known.
        """
        assert self.policies is not None
        if root != "" and not self.policies.uniform:
            where = f"{root} and every layer of its class" if root else "several layers"
            return (
                f"a graph break makes {where} share one graph, so layers= and dense_last= cannot "
                "tell them apart: mend the break, or drop them"
            )
        known = len(self.layers)
        self.layers += [k for k in map(_key, sites) if k not in self.layers]
        if self.policies.dense_last and 0 < known < len(self.layers):
            raise DenseLastUnknown(
                f"dense_last={self.policies.dense_last} needs the whole model in one graph, and "
                "torch.compile broke it in several; name the dense layers in layers={...: None}"
            )
        index = self.layers.index(_key(site))
        if index >= len(self.layers) - self.policies.dense_last:
            return f"one of the last {self.policies.dense_last} (dense_last)"
        found = self.policies.find(site.layer, index)
        return "kept dense by the policy" if found is None else found

    def unused(self) -> list[str]:
        """Keys of `layers` that fit no attention seen so far."""
        return [] if self.policies is None else self.policies.unused([n for n, _ in self.layers])


def _writes_to_parameters(captured: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a graph changes a parameter that it is given, itself or through a view."""
    placeholders = [n for n in captured.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, example_inputs, strict=True)
    given = [n for n, x in pairs if isinstance(x, torch.nn.Parameter)]
    memory = Memory(captured.graph) if given else None
    return memory is not None and any(memory.written_at(node) for node in given)


def _key(site: AttentionSite) -> tuple[str, int]:
    return site.layer, site.ordinal


# --- the backend found by name --------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "block": 4096,
    "topk": 12,
    "sinks": 1,
    "causal_only": True,
    "recompute_routing": False,
    "on_miss": "warn",
    "compiler": "inductor",
    "inductor": None,
}
FLAGS = ("causal_only", "recompute_routing")
# The backend is given graphs, not the model: after a graph break it cannot tell layers apart.
OF_SPARSIFY = ("layers", "dense_last")

_records: list[Record] = []


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """DEFAULTS updated by the user's options.

    Raises:
        ValueError: for an unknown option (listing the known ones) or a bad value.
        TypeError: for a value of the wrong type.
    """
    for name in options or {}:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            if name in OF_SPARSIFY:
                hint = " (policies per layer need the model: moonfx.sparsify takes them)"
            raise ValueError(
                f"unknown option {name!r} of backend 'moonfx'{hint}; known: {', '.join(DEFAULTS)}"
            )
    known = {**DEFAULTS, **(options or {})}
    for flag in FLAGS:
        check_flag(flag, known[flag])
    check_choice("on_miss", known["on_miss"], ON_MISS)
    check_choice("compiler", known["compiler"], COMPILERS)
    if known["inductor"] is not None and not isinstance(known["inductor"], dict):
        raise TypeError(f"inductor must be a dict of Inductor options, got {known['inductor']!r}")
    return known


def check_choice(name: str, given: object, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")


def compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Entry point of torch.compile(backend="moonfx").

    Past Dynamo's recompile limit a model runs as if it were not compiled, dense, and it is
    torch.compile that says so; under moonfx.sparsify the limit is higher, and an error.

    Args:
        mode: a mode of Inductor, as torch.compile takes it.
        options: block, topk, sinks, causal_only, recompute_routing, on_miss and compiler as for
            moonfx.sparsify; "inductor": a dict of Inductor options. on_miss counts for a graph that
            holds attention, or that is not a piece left by a graph break; of an optimizer's step,
            for one of which no iteration is faster or left by the cost model (`steps`).
    """
    known = check_options(options)
    config = {**mode_options(mode), **(known["inductor"] or {})}
    default = LayerPolicy(known["block"], known["topk"], known["sinks"])
    policies = Policies(default, **{flag: known[flag] for flag in FLAGS})
    backend = Backend(policies, known["compiler"], config=config)
    compiled = backend(gm, example_inputs)
    _records[:] = [r for r in _records if r.is_used]
    _records.extend(backend.records)
    (record,) = backend.records
    report, what = backend.report, f"{_what(record)} compiled by backend 'moonfx'"
    if (record.of_optimizer or report.iterations) and not (report.rows or report.failures):
        of_step = record.optimizer and record.optimizer()
        earlier = (r for r in _records if of_step and r.of(of_step) and r is not record)
        before = [(r.iterations, r.broken) for r in earlier]
        inputs = [*example_inputs, *held_tensors(gm).values()]
        problem = steps.problem(what, gm, inputs, record.iterations, before)
        if problem is not None:
            miss(known["on_miss"], report, what, problem)
    elif record.of_optimizer and not report.rows:
        miss(known["on_miss"], report, what, f"{what} runs as it was")
    elif not report.rewritten and (report.rows or report.failures or not is_piece(gm)):
        miss(known["on_miss"], report, what)
    return compiled


def _what(record: Record) -> str:
    optimizer = record.optimizer and record.optimizer()
    return f"the step of {type(optimizer).__name__}" if optimizer else "a graph"


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
    own = [r for r in _records if r.of(optimizer)]
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    same = (r for r in _records if any(id(p()) in ids for p in r.parameters))
    found = own or [r for r in same if r.of_optimizer]
    return report_on(found) if found else None


def miss(on_miss: str, report: Report, what: str, problem: str | None = None) -> None:
    """Says that nothing became sparse, or what else missed its aim, as `on_miss` asks."""
    if on_miss == "ignore":
        return
    message = f"moonfx: {problem or f'no attention of {what} became sparse'}\n{report}"
    if on_miss == "raise":
        raise NothingRewritten(message)
    warnings.warn(message, stacklevel=3)
