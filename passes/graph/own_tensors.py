"""Tensors that a graph makes itself and then writes to, and which writes each reader sees.

    m = ones(N, N); v = m.view(-1); v.add_(1); out = m + 1        out sees one write, through v

A tensor is the graph's own where its memory was made by one operator of the graph, and everything
that touches it is an operator with a schema or a body that can be looked into.
"""

from collections.abc import Iterator

from torch import fx

from moonfx.capture.graph_nodes import is_higher_order
from moonfx.passes.graph.aliases import aliases, is_opaque, writes
from moonfx.passes.graph.memory_versions import copies
from moonfx.passes.graph.nodes import body_of
from moonfx.passes.graph.union_find import UnionFind


class OwnTensors:
    """The memory that one graph makes, as the graph stands now."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._sets = UnionFind[fx.Node]()
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self._made: dict[fx.Node, list[fx.Node]] = {}
        self._foreign: set[fx.Node] = set()
        for node in graph.nodes:
            for source in self.sources(node):
                self._sets.join(source, node)
        for node in graph.nodes:
            memory = self._sets.find(node)
            if not self.sources(node):
                self._made.setdefault(memory, []).append(node)
            for target in writes(node):
                self._writers.setdefault(self._sets.find(target), []).append(node)
            if node.op not in ("call_function", "output") or _is_unknown(node):
                self._foreign.update(map(self._sets.find, (node, *node.all_input_nodes)))

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose memory a node's result may lie in."""
        return [] if node.op == "output" or copies(node) else aliases(node)

    def readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that read a node's values, by its name or through a view; no writes to it."""
        for user in node.users:
            if node in self.sources(user):
                yield from self.readers(user)
            elif node not in writes(user):
                yield user

    def is_own(self, node: fx.Node) -> bool:
        """Whether all that happens to a node's memory is known."""
        memory = self._sets.find(node)
        return memory not in self._foreign and len(self._made[memory]) == 1

    def writers(self, node: fx.Node, place: int) -> list[fx.Node]:
        """The nodes that write to a node's memory before a place in the graph, in order."""
        found = self._writers.get(self._sets.find(node), [])
        return [writer for writer in found if self.position[writer] < place]


def _is_unknown(node: fx.Node) -> bool:
    """Whether a node may keep or write to what it is given."""
    return is_opaque(node) and not (is_higher_order(node) and body_of(node) is not None)
