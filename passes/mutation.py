"""Which nodes of a graph are written to in place, directly or through a view."""

import functools
import operator

import torch
from torch import fx

from moonfx.capture import is_higher_order
from moonfx.passes.nodes import argument, body_of, operands_of

aten = torch.ops.aten

# Changes what autograd thinks of a tensor, never its values.
_HARMLESS = {aten.detach_.default}

# May return an argument itself, or views of it, without saying so in the schema.
_UNMARKED = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.type_as.default,
    aten.broadcast_tensors.default,
    aten.meshgrid.default,
    aten.meshgrid.indexing,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
}

# Higher-order operators that only read.
_READ_ONLY = ("flex_attention",)


def aliases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the node's result may share."""
    if node.target is operator.getitem or node.target in _UNMARKED:
        return node.all_input_nodes
    places = _marked(node.target)[0]
    return [n for place in places for n in _nodes(_given(node, *place))]


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes into."""
    if node.op == "call_function" and is_higher_order(node):
        return _body_writes(node)
    if node.target in _HARMLESS:
        return []
    places = _marked(node.target)[1]
    return [n for place in places for n in _nodes(_given(node, *place))]


Places = list[tuple[int, str]]


@functools.cache
def _marked(target: object) -> tuple[Places, Places]:
    """Which arguments an operator's schema says that its result shares, and which it writes."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return [], []
    marked = [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments) if a.alias_info]
    shares = any(r.alias_info is not None for r in schema.returns)
    shared = [(i, name) for i, name, _ in marked] if shares else []
    return shared, [(i, name) for i, name, info in marked if info.is_write]


def _body_writes(node: fx.Node) -> list[fx.Node]:
    """What a higher-order operator writes: what its body does, or all where that is hidden."""
    if any(name in str(node.target) for name in _READ_ONLY):
        return []
    body = body_of(node)
    operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if body is None:
        return operands
    written = last_writes(body.graph)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, operands_of(node), strict=True)
    return [a for p, a in pairs if p in written and isinstance(a, fx.Node)]


def _given(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _nodes(value: object) -> list[fx.Node]:
    if isinstance(value, list | tuple):
        return [n for n in value if isinstance(n, fx.Node)]
    return [value] if isinstance(value, fx.Node) else []


def made_in_place(node: fx.Node, settled: set[fx.Node]) -> list[fx.Node]:
    """What the node writes to before anyone else reads it, as zeros(..).masked_fill_(..) does.

    Whoever reads the memory reads it through the node's result, and so after the write. `settled`:
    the nodes of which this is known already, so that such writes may follow one another.
    """
    targets = writes(node)
    if len(targets) != 1 or is_higher_order(node):
        return []
    (target,) = targets
    fresh = target.op == "call_function" and not aliases(target) and not is_higher_order(target)
    lone = list(target.users) == [node] and sum(x is target for x in node.all_input_nodes) == 1
    if not (lone and (fresh or target in settled)):
        return []
    return [target, node]


def _draws_nothing(node: fx.Node) -> bool:
    """Whether a dropout, or attention with one, is inactive: no random number is drawn."""
    if node.target is aten.dropout.default:
        return not argument(node, 2, "train") or argument(node, 1, "p") == 0.0
    if node.target is aten.scaled_dot_product_attention.default:
        return argument(node, 4, "dropout_p", 0.0) == 0.0
    return False


def remove_dead_code(graph: fx.Graph) -> None:
    """Graph.eliminate_dead_code, which by itself keeps what works in place or may draw a number.

    Without it the dense scores would live on behind an inactive dropout.
    """
    settled: set[fx.Node] = set()
    for node in graph.nodes:
        settled.update(made_in_place(node, settled))
    graph.eliminate_dead_code(
        lambda node: not (node in settled or _draws_nothing(node)) and node.is_impure()
    )


def last_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node whose memory is written to -> the last operator that writes it."""
    memory = _Memory()
    constants: dict[object, fx.Node] = {}
    written: list[tuple[fx.Node, fx.Node]] = []
    settled: set[fx.Node] = set()
    for node in graph.nodes:
        for source in aliases(node):
            memory.join(source, node)
        if node.op == "get_attr":
            memory.join(constants.setdefault(node.target, node), node)
        settled.update(made := made_in_place(node, settled))
        written += [(target, node) for target in writes(node) if target not in made]
    last = {memory.of(target): writer for target, writer in written}
    return {n: last[memory.of(n)] for n in graph.nodes if memory.of(n) in last} if last else {}


class _Memory:
    """Sets of nodes that may share memory (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The set's representative."""
        while (parent := self.parent.get(node, node)) is not node:
            self.parent[node] = self.parent.get(parent, parent)
            node = parent
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.of(b)] = self.of(a)
