"""Which memory each node of a graph reads and writes, and which value a name stands for when.

    y = x.mul_(2); z = x + 1         z reads y: a name stands for what was last written to it
    t = x.T; x.add_(1); u = t @ x    u reads t after a write that t's own node does not show

A `TensorVersion` is a node and how often its memory was written to before it is read: two versions
are one value only if both are equal. Which nodes share memory is read from the operators' schemas
and, for what the graph is given, from storages.
"""

import bisect
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from moonfx.capture.graph_nodes import placeholders
from moonfx.capture.sizes import storage_of
from moonfx.passes.graph.aliases import aliases, is_opaque, writes
from moonfx.passes.graph.nodes import operator_name
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.graph.union_find import UnionFind

aten = torch.ops.aten

_MAY_COPY = CASTS | {aten.contiguous.default}
# Write to a tensor's sizes, so that its old name stands for something else.
_RESHAPE = ("resize", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swap")


class TensorVersion(NamedTuple):
    """A tensor as it is after `version` writes to its memory."""

    node: fx.Node
    version: int


def is_barrier(node: fx.Node) -> bool:
    """Whether a node keeps its place among all others: an autocast, an assertion."""
    if is_opaque(node):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or is_random(node):
        return False
    return node.is_impure() and not schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers, each of which depends on how many were drawn before."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class Memory:
    """The memory of one graph's nodes, as the graph stands now.

    Args:
        distinct_inputs: whether inputs of different storages are known to be different memory; in
            a nested body they are not.
    """

    def __init__(self, graph: fx.Graph, distinct_inputs: bool = True) -> None:
        self._nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self._nodes)}
        self._sets = UnionFind[fx.Node]()  # of nodes that may share memory
        self._written: dict[fx.Node, list[int]] = {}
        self._renamed: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        given: dict[object, fx.Node] = {}
        targets = {node: self.writes(node) for node in graph.nodes}
        for node in graph.nodes:
            for source in self.aliases(node):
                self._sets.join(source, node)
            if node.op in ("placeholder", "get_attr"):
                first = given.setdefault(_storage(node) if distinct_inputs else None, node)
                self._sets.join(first, node)
        for node in graph.nodes:
            self.members.setdefault(self.of(node), []).append(node)
            for target in targets[node]:
                self._written.setdefault(self.of(target), []).append(self.position[node])
            if (name := _renamed(node)) is not None:
                self._renamed.setdefault(name, []).append((self.position[node], node))

    def of(self, node: fx.Node) -> fx.Node:
        """The representative of the memory that a node's result lies in."""
        return self._sets.find(node)

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """The operands that a node may write to."""
        if not is_opaque(node):
            return writes(node)
        return [n for n in node.all_input_nodes if n.op != "get_attr" or _is_tensor(n)]

    def written_at(self, node: fx.Node) -> list[int]:
        """The positions of the nodes that write to a node's memory."""
        return self._written.get(self.of(node), [])

    def writers(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """The nodes that write to a node's memory before a reader does, or are the reader."""
        written = self.written_at(node)
        return [
            self._nodes[i] for i in written[: bisect.bisect_right(written, self.position[reader])]
        ]

    def read(self, reader: fx.Node, operand: fx.Node) -> TensorVersion:
        """The value of an operand that a node reads."""
        before = self.position[reader]
        node = operand
        while renamed := [n for at, n in self._renamed.get(node, []) if at < before]:
            node = renamed[-1]
        return TensorVersion(node, bisect.bisect_left(self.written_at(node), before))

    def result(self, node: fx.Node) -> TensorVersion:
        """The value that a node makes."""
        return TensorVersion(node, bisect.bisect_right(self.written_at(node), self.position[node]))

    def is_shared(self, node: fx.Node) -> bool:
        """Whether a node of unknown effects makes or reads a node, and so may keep its memory."""
        return is_opaque(node) or any(is_opaque(user) for user in node.users)

    def is_returned(self, node: fx.Node) -> bool:
        """Whether the graph returns a tensor that lies in a node's memory."""
        return any(u.op == "output" for m in self.members[self.of(node)] for u in m.users)

    def aliases(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose memory a node's result may lie in."""
        if copies(node):
            return []
        if is_opaque(node):
            return node.all_input_nodes
        if node.target is operator.getitem:
            source = node.all_input_nodes[0]
            if hasattr(source.target, "_schema") and not aliases(source):
                return []  # one of several new tensors
        return aliases(node)


def writes_to_parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph changes a parameter that it is given, itself or through a view.

    Args:
        inputs: what its placeholders stand for, in their order.
    """
    pairs = zip(placeholders(gm.graph), inputs, strict=True)
    given = [n for n, x in pairs if isinstance(x, torch.nn.Parameter)]
    memory = Memory(gm.graph) if given else None
    return memory is not None and any(memory.written_at(node) for node in given)


def _storage(node: fx.Node) -> object:
    """What two inputs share that may lie in the same memory; None for one that may share any."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return storage_of(value)
    return None if node.op == "get_attr" else node


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _renamed(node: fx.Node) -> fx.Node | None:
    """The operand that a node returns after a write: x of x.mul_(2), of torch.mm(a, b, out=x)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    targets = writes(node)
    returned = len(targets) == 1 and schema.returns[0].alias_info.is_write
    return targets[0] if returned and not operator_name(node).startswith(_RESHAPE) else None


def copies(node: fx.Node) -> bool:
    """Whether a node that may return its operand itself is known to return a copy."""
    if node.target not in _MAY_COPY:
        return False
    source, value = (n.meta.get("val") for n in (node.args[0], node))  # type: ignore[union-attr]
    if not (isinstance(source, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    if (source.dtype, source.device) != (value.dtype, value.device):
        return True
    return node.target is aten.contiguous.default and source.stride() != value.stride()
