"""Captures one graph, runs the passes on it under its model's policies, records what they found."""

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moonfx.backend.guards import Values, checked
from moonfx.backend.records import Record, report_on
from moonfx.backend.runs import recorded
from moonfx.capture.compiled_calls import is_left_out
from moonfx.capture.dynamo_frames import (
    break_after,
    compiled_frame,
    is_piece,
    owner,
    returns_gradients,
)
from moonfx.capture.exported_program import capture_exported, exported_again, is_decomposed
from moonfx.capture.graph_nodes import graph_root, name_invoked_bodies, placeholders
from moonfx.capture.inductor import compile_graph
from moonfx.capture.retrace import CaptureError, capture, held_tensors
from moonfx.environment import verifying
from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import writes_to_parameters
from moonfx.passes.parameters.dataflow import DataFlow, GraphCall
from moonfx.passes.pass_manager import WITHOUT_ATTENTION, Passes, check_passes, run_passes
from moonfx.passes.symbolic import input_masks as given_masks
from moonfx.policy import LayerPolicy, Policies
from moonfx.report.attention import Row, row_of
from moonfx.report.newton_schulz import rows_of
from moonfx.report.report import Report
from moonfx.site import AttentionSite
from moonfx.verdicts import Verdicts, verdicts_of

log = logging.getLogger("moonfx.backend")


class DenseLastUnknown(ValueError):
    """dense_last with a model that is compiled in pieces."""


class Backend:
    """Compiles the graphs of one model under one set of policies.

    Args:
        policies: what each layer becomes; None leaves every graph as it is.
        compiler: one of COMPILERS.
        model: the model whose graphs these are, where it is known.
        config: Inductor options to pass on.
    Raises:
        ValueError: if the policies disable a pass that there is not.
    """

    def __init__(
        self,
        policies: Policies | None,
        compiler: str = "inductor",
        model: torch.nn.Module | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if policies is not None:
            check_passes(policies.disable_passes)
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
        self.verdicts = Verdicts()
        self.outside: dict[tuple[str, str], Row] = {}
        self.layers: list[tuple[str, int]] = []

    @property
    def report(self) -> Report:
        return self.report_on(self.records)

    def report_on(self, records: Iterable[Record]) -> Report:
        """The report of some graphs of this model, and what Dynamo was told to leave out."""
        report = report_on(records)
        report.rows += self.outside.values()
        report.failures += self.left_out
        return report

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles one graph; called by Dynamo."""
        graph, guards = self.rewrite(gm, example_inputs)
        stamp = f"{self.policies}"
        compiled = compile_graph(graph, example_inputs, self.compiler, stamp, self.config)
        record = self.records[-1] if self.policies is not None else None
        if record is None:
            return compiled
        if not guards:
            return recorded(compiled, record, gm.forward)

        def note(what: str) -> None:
            record.failure = what

        return recorded(checked(compiled, guards, gm.forward, note), record, gm.forward)

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
        given = (x for x in (*example_inputs, *held) if isinstance(x, torch.nn.Parameter))
        parameters: list[weakref.ref[torch.Tensor]] = [weakref.ref(x) for x in given]
        called_by = owner()
        record = Record([], None, parameters, of_optimizer=bool(held))
        record.disabled = self.policies.disable_passes
        record.frame, record.broken = compiled_frame(), break_after(gm)
        if not self.names and isinstance(called_by, torch.nn.Module):
            self.verdicts = verdicts_of(called_by)
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
        if root is None:  # "" would say that the graph is of the whole model
            root = self.names.get(id(called_by)) or None
        context = self.run_passes(captured, root, record)
        if record.failure is not None and context is None:  # of a graph that may be half rewritten
            captured = capture(gm, example_inputs)
            context = self.run_passes(captured, root, record, WITHOUT_ATTENTION)
        if called_by is None and record.iterations:
            record.of_optimizer = record.of_optimizer or writes_to_parameters(
                captured, example_inputs
            )
        if record.of_optimizer:
            record.run = None
        if context is None:
            return gm, {}
        name_invoked_bodies(captured, retraced=True)
        known = placeholders(captured.graph)
        guards = {
            known.index(node): values for node, values in context.proofs.items() if node in known
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
            if verifying():
                raise
            log.exception("the uses of a graph's parameters stay unknown; please report this")

    def rewrite_exported(self, program: ExportedProgram) -> ExportedProgram:
        """A new program with what the policies make sparse; the given one stays as it is.

        What was proved of a buffer's values was proved of those that the program holds.
        """
        assert self.policies is not None
        record = Record([], None, [], disabled=self.policies.disable_passes)
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
        disabled = self.policies.disable_passes
        context = Context(captured, self.policy_of, self.names, root, *flags, disabled)
        context.likely_policy, context.verdicts = self.likely_policy_of, self.verdicts
        try:
            rewritten = run_passes(context, *passes)
        except DenseLastUnknown:
            raise
        except Exception as error:
            if verifying():
                raise
            failure = f"a pass failed, attentions stay: {type(error).__name__}: {error}"
            record.failure = record.failure or failure
            log.exception("a pass failed, and the graph's attentions stay; please report this")
            return None
        isolated = [f"a pass failed, what the others did stays: {f}" for f in context.failures]
        record.failure = "\n".join(filter(None, [record.failure, *isolated])) or None
        record.rows += map(row_of, context.sites)
        record.iterations = rows_of(context.iterations)
        self._note_verdicts(context.sites, record)
        return context if rewritten else None

    def _note_verdicts(self, sites: Iterable[AttentionSite], record: Record) -> None:
        """Takes note of what became of a graph's attentions, which others may overrule."""

        def overrule(why: str) -> None:
            record.overruled = f"{why}; the call ran as it was written, and not compiled"

        record.lost = self.verdicts.note(sites, overrule)

    def policy_of(
        self, site: AttentionSite, sites: list[AttentionSite], root: str | None
    ) -> LayerPolicy | str:
        """A site's policy, or why it stays dense.

        Args:
            sites: all attentions of its graph, in order.
            root: the module that the graph starts in, "" for the model, None if that is not known.
        """
        assert self.policies is not None
        if not self._tells_layers_apart(root):
            where = f"{root} and every layer of its class" if root else "several layers"
            return (
                f"a graph break makes {where} share one graph, so layers= and dense_last= cannot "
                "tell them apart: mend the break, or drop them"
            )
        known, self.layers = len(self.layers), self._layers_with(sites)
        if self.policies.dense_last and 0 < known < len(self.layers):
            raise DenseLastUnknown(
                f"dense_last={self.policies.dense_last} needs the whole model in one graph, and "
                "torch.compile broke it in several; name the dense layers in layers={...: None}"
            )
        found = self.likely_policy_of(site, sites, root)
        if found is None and self._is_last(site, self.layers):
            return f"one of the last {self.policies.dense_last} (dense_last)"
        return "kept dense by the policy" if found is None else found

    def likely_policy_of(
        self, site: AttentionSite, sites: list[AttentionSite], root: str | None
    ) -> LayerPolicy | None:
        """A site's policy, as far as is known before all attentions are; notes nothing."""
        assert self.policies is not None
        layers = self._layers_with(sites)
        if not self._tells_layers_apart(root) or self._is_last(site, layers):
            return None
        return self.policies.find(site.layer, layers.index(_key(site)))

    def _tells_layers_apart(self, root: str | None) -> bool:
        """Whether a graph with this root says which layer is which, where that matters."""
        assert self.policies is not None
        return root == "" or self.policies.uniform

    def _layers_with(self, sites: list[AttentionSite]) -> list[tuple[str, int]]:
        """All attentions that are known, with those of one more graph."""
        return [*self.layers, *(k for k in map(_key, sites) if k not in self.layers)]

    def _is_last(self, site: AttentionSite, layers: list[tuple[str, int]]) -> bool:
        assert self.policies is not None
        return layers.index(_key(site)) >= len(layers) - self.policies.dense_last

    def unused(self) -> list[str]:
        """Keys of `layers` that fit no attention seen so far."""
        return [] if self.policies is None else self.policies.unused([n for n, _ in self.layers])


def _key(site: AttentionSite) -> tuple[str, int]:
    return site.layer, site.ordinal
