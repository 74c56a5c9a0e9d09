"""What the passes share while they work on one captured graph."""

import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value, input_name, may_be_trained, nested_graphs
from moonfx.passes.graph.aliases import last_writes
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.modes import Mode, inside, modes
from moonfx.passes.graph.nodes import body_of, operands_of
from moonfx.passes.graph.operators import DETACHED
from moonfx.passes.symbolic.input_masks import Given, is_frozen
from moonfx.passes.symbolic.reader import Reader
from moonfx.passes.symbolic.real_reader import RealReader
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite, Declined, NewtonSchulzSite

log = logging.getLogger("moonfx.passes")


@dataclass
class Context:
    """One captured graph, the sites found in it, and the policy for each.

    Args:
        gm: the captured graph.
        policy: gives a site (of all sites, in a graph with this root) its LayerPolicy, or says
            why it stays dense.
        names: id of each module of the user's model -> its qualified name.
        root: name of the module that the graph starts in, "" for the model itself, None if that is
            not known.
        causal_only: whether bidirectional self-attention stays dense.
        recompute_routing: whether the backward chooses blocks again instead of keeping the choice.
        iterations: the Newton-Schulz iterations found.
        proofs: constants and given masks of the graph that a rewrite rests on -> their values.
        failures: passes that failed and left the graph to the others.
    """

    gm: fx.GraphModule
    policy: Callable[[AttentionSite, list[AttentionSite], str | None], LayerPolicy | str]
    names: dict[int, str] = field(default_factory=dict)
    root: str | None = ""
    causal_only: bool = True
    recompute_routing: bool = False
    sites: list[AttentionSite] = field(default_factory=list)
    iterations: list[NewtonSchulzSite] = field(default_factory=list)
    proofs: dict[fx.Node, tuple[float, float] | Given] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outer: dict[fx.Graph, fx.Node] = {}
        self._writes: dict[fx.Graph, dict[fx.Node, fx.Node]] = {}
        self._modes: dict[fx.Graph, dict[fx.Node, Mode]] = {}
        self._inputs: dict[fx.Graph, dict[fx.Node, int]] = {}
        self._start = Mode(torch.is_grad_enabled())  # Dynamo compiles under the mode it guards on
        for gm in nested_graphs(self.gm):
            for node in gm.graph.nodes:
                if (body := body_of(node)) is not None:
                    self._outer[body.graph] = node
        self.reader = Reader(self.outer, self.mutated, self.name_of)
        self._real = {grad: self._real_reader(grad) for grad in (True, False)}
        self._trained: dict[fx.Node, bool] = {}
        self.masks: dict[tuple[Hashable, ...], Any] = {}

    def graphs(self) -> Iterator[fx.GraphModule]:
        yield from nested_graphs(self.gm)

    def outer(self, node: fx.Node) -> fx.Node | None:
        """The node that a placeholder of a nested body is called with."""
        call = self._outer.get(node.graph)
        if call is None or node.op != "placeholder":
            return None
        if node.graph not in self._inputs:
            placeholders = [n for n in node.graph.nodes if n.op == "placeholder"]
            self._inputs[node.graph] = {n: i for i, n in enumerate(placeholders)}
        operand = operands_of(call)[self._inputs[node.graph][node]]
        return operand if isinstance(operand, fx.Node) else None

    def name_of(self, node: fx.Node) -> str:
        """The user's name for an input of the graph, as model.layers.0.bias; else the node's."""
        known = input_name(node)
        if known is None:
            return node.name
        inside, name = known
        return f"{self.root}.{name}" if inside and self.root else name

    def in_this_call(self, node: fx.Node, layer: str) -> str:
        """A module's name as it is in the call of the nested body that the node is in.

        torch.compiler.nested_compile_region traces its function once, so that the bodies of later
        calls say where the first was: what tells the calls apart is whose parameters they are.
        """
        call = self._outer.get(node.graph)
        if call is None or getattr(call.target, "__name__", "") != "invoke_subgraph":
            return layer
        alike = [c for c in self._outer.values() if c.target is call.target]
        first = next(c for c in alike if c.args[1] == call.args[1])
        before, now = (self._around(c) for c in (first, call))
        return now + layer[len(before) :] if before and layer.startswith(before) else layer

    def _around(self, call: fx.Node) -> str:
        """The module that holds all parameters that a nested body is called with, "" if none."""
        operands = (self._outermost(n) for n in operands_of(call) if isinstance(n, fx.Node))
        known = [self.name_of(n).split(".") for n in operands if input_name(n) is not None]
        columns = zip(*(parts for parts in known if len(parts) > 1), strict=False)
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, columns)
        return ".".join(names[0] for names in shared)

    def _outermost(self, node: fx.Node) -> fx.Node:
        outside = self.outer(node)
        return node if outside is None else self._outermost(outside)

    def call_of(self, graph: fx.Graph) -> fx.Node | None:
        """The node that calls the nested body with this graph, None for the outermost."""
        return self._outer.get(graph)

    def writes(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        if graph not in self._writes:
            self._writes[graph] = last_writes(graph)
        return self._writes[graph]

    def mode(self, node: fx.Node) -> Mode:
        """The mode that a node runs under; in a nested body, also that of its call."""
        graph = node.graph
        if node not in self._modes.get(graph, {}):
            call = self.call_of(graph)
            self._modes[graph] = modes(
                graph, self._start if call is None else inside(call, self.mode(call))
            )
        return self._modes[graph][node]

    def real(self, site: AttentionSite) -> RealReader:
        """A reader of what is added to a site's scores."""
        return self._real[self.mode(site.output).gradients]

    def _real_reader(self, gradients: bool) -> RealReader:
        return RealReader(self.reader, self._gradient_ends if gradients else lambda node: False)

    def _gradient_ends(self, node: fx.Node) -> bool:
        """Whether a node is made of what may be trained, but is not itself differentiable."""
        return (node.target in DETACHED or not self.mode(node).gradients) and self._is_trained(node)

    def needs_gradient(self, node: fx.Node, memory: Memory) -> bool:
        """Whether a gradient may flow through a node, also from what is written to its operands."""
        if not self.mode(node).gradients:
            return False
        return any(map(self._needs_it, self._floats_above(node, memory)))

    def _needs_it(self, node: fx.Node) -> bool:
        outside = self.outer(node)
        if outside is not None:
            memory = Memory(outside.graph, self.call_of(outside.graph) is None)
            return any(map(self._needs_it, self._floats_above(outside, memory)))
        return may_be_trained(node)

    def _is_trained(self, node: fx.Node) -> bool:
        """Whether floats are made of a parameter or of what the user passes in."""
        if node not in self._trained:
            self._trained[node] = any(map(self._may_be_trained, self._floats_above(node)))
        return self._trained[node]

    def _may_be_trained(self, node: fx.Node) -> bool:
        outside = self.outer(node)
        if outside is not None:
            return self._is_trained(outside)
        frozen = is_frozen(node) or buffer_value(node) is not None
        return node.op == "placeholder" and not frozen

    def _floats_above(self, node: fx.Node, memory: Memory | None = None) -> set[fx.Node]:
        """A node and what floating point tensors it is made of, in its graph.

        Args:
            memory: of the graph, to follow gradients: not through what is detached, and as well
                what is written, under gradients, through other names of the same memory before
                the node.
        """
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in found and _has_floats(current.meta.get("val")):
                found.add(current)
                stack += [] if memory and current.target in DETACHED else current.all_input_nodes
                for writer in memory.writers(current, node) if memory else ():
                    stack += writer.all_input_nodes if self.mode(writer).gradients else []
        return found

    def changed(self, graph: fx.Graph) -> None:
        """Says that a pass put nodes into the graph: what is known of it is out of date.

        That nothing in it is written to stays true: no pass puts a write into a graph. To look for
        writes again after each site would take time that grows with the square of the graph.
        """
        for known in (self._modes, self._inputs):
            known.pop(graph, None)
        if self._writes.get(graph):
            del self._writes[graph]

    def mutated(self, node: fx.Node) -> bool:
        return node in self.writes(node.graph)

    def rest_on_constants(self, site: AttentionSite) -> None:
        """Keeps the constants between the site's operands and its output, and in its masks."""
        ends = {site.query, site.key, site.value}
        seen, stack = set(ends), [site.output, *(mask for mask, _ in site.masks)]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.reader.constants:
                self.proofs[node] = self.reader.constants[node]
            outside = self.outer(node)
            stack += node.all_input_nodes if outside is None else [outside]

    def decline(self, site: AttentionSite, reason: Declined) -> None:
        """Leaves a site as it is, for a reason."""
        site.reject = reason.with_traceback(None)  # whose frames would keep the graph
        site.action = "declined"
        log.info("%s (%s): declined: %s", site.layer, site.line, reason)

    def replaced(self, old: fx.Node, new: fx.Node, but: Collection[fx.Node] = ()) -> None:
        """Gives another node to all users of a node but some, and to attentions that it enters."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in but)
        for site in self.sites:
            for name in ("query", "key", "value"):
                if getattr(site, name) is old:
                    setattr(site, name, new)


def _has_floats(value: object) -> bool:
    """Whether a value is a floating point tensor, or several results of which one is."""
    if isinstance(value, list | tuple):
        return any(map(_has_floats, value))
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
