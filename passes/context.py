"""What the passes share while they work on one captured graph."""

import logging
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import nested_graphs
from moonfx.passes.graph.aliases import last_writes
from moonfx.passes.graph.gradients import Gradients
from moonfx.passes.graph.modes import Mode, inside, modes
from moonfx.passes.graph.nesting import Nesting
from moonfx.passes.graph.own_tensors import OwnTensors
from moonfx.passes.symbolic.input_masks import Given, is_frozen
from moonfx.passes.symbolic.reader import Reader
from moonfx.passes.symbolic.real_reader import RealReader
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite, Declined, NewtonSchulzSite
from moonfx.verdicts import Verdicts

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
        likely_policy: what `policy` may say of a site, for a reason; None if it stays dense.
        disabled: names of passes that do not run.
        verdicts: what became of the model's attentions in the graphs before this one.
        iterations: the Newton-Schulz iterations found.
        proofs: constants and given masks of the graph that a rewrite rests on -> their values.
        failures: passes that failed and left the graph to the others.
        nesting: how its graphs lie in one another.
        gradients: where gradients flow.
        reader: reads its masks at symbolic indices.
        masks: masks as they were read -> what they were proved to be, for layers that share them.
    """

    gm: fx.GraphModule
    policy: Callable[[AttentionSite, list[AttentionSite], str | None], LayerPolicy | str]
    names: dict[int, str] = field(default_factory=dict)
    root: str | None = ""
    causal_only: bool = True
    recompute_routing: bool = False
    disabled: tuple[str, ...] = ()
    likely_policy: Callable[
        [AttentionSite, list[AttentionSite], str | None], LayerPolicy | None
    ] = lambda site, sites, root: None
    verdicts: Verdicts = field(default_factory=Verdicts)
    sites: list[AttentionSite] = field(default_factory=list)
    iterations: list[NewtonSchulzSite] = field(default_factory=list)
    proofs: dict[fx.Node, tuple[float, float] | Given] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._writes: dict[fx.Graph, dict[fx.Node, fx.Node]] = {}
        self._modes: dict[fx.Graph, dict[fx.Node, Mode]] = {}
        self._start = Mode(torch.is_grad_enabled())  # Dynamo compiles under the mode it guards on
        self.nesting = Nesting(self.gm, self.root)
        self.gradients = Gradients(self.nesting, self.mode, is_frozen)
        self._tensors: dict[fx.Graph, OwnTensors] = {}
        self.reader = Reader(self.nesting.outer, self.mutated, self.nesting.name_of, self.tensors)
        self._real = {
            True: RealReader(self.reader, self.gradients.end_at),
            False: RealReader(self.reader, lambda node: False),
        }
        self.masks: dict[tuple[Hashable, ...], Any] = {}

    def graphs(self) -> Iterator[fx.GraphModule]:
        yield from nested_graphs(self.gm)

    def writes(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        if graph not in self._writes:
            self._writes[graph] = last_writes(graph)
        return self._writes[graph]

    def mode(self, node: fx.Node) -> Mode:
        """The mode that a node runs under; in a nested body, also that of its call."""
        graph = node.graph
        if node not in self._modes.get(graph, {}):
            call = self.nesting.call_of(graph)
            self._modes[graph] = modes(
                graph, self._start if call is None else inside(call, self.mode(call))
            )
        return self._modes[graph][node]

    def real(self, site: AttentionSite) -> RealReader:
        """A reader of what is added to a site's scores."""
        return self._real[self.mode(site.output).gradients]

    def changed(self, graph: fx.Graph) -> None:
        """Says that a pass put nodes into the graph: what is known of it is out of date.

        That nothing in it is written to stays true: no pass puts a write into a graph. To look for
        writes again after each site would take time that grows with the square of the graph.
        """
        self._modes.pop(graph, None)
        self._tensors.pop(graph, None)
        self.nesting.changed(graph)
        if self._writes.get(graph):
            del self._writes[graph]

    def mutated(self, node: fx.Node) -> bool:
        return node in self.writes(node.graph)

    def tensors(self, node: fx.Node) -> OwnTensors:
        """What the node's graph makes and writes to."""
        if node.graph not in self._tensors or node not in self._tensors[node.graph].position:
            self._tensors[node.graph] = OwnTensors(node.graph)
        return self._tensors[node.graph]

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
