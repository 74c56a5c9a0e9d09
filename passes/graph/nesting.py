"""The bodies that a captured graph calls: what their inputs are outside, and by what names."""

import itertools

from torch import fx

from moonfx.capture.graph_nodes import input_name, nested_graphs, placeholders
from moonfx.passes.graph.nodes import body_of, operands_of


class Nesting:
    """How the graphs of a captured graph lie in one another.

    Args:
        gm: the outermost.
        root: name of the module that it starts in, "" for the model itself, None if that is not
            known.
    """

    def __init__(self, gm: fx.GraphModule, root: str | None) -> None:
        self.root = root
        self._calls: dict[fx.Graph, fx.Node] = {}
        self._inputs: dict[fx.Graph, dict[fx.Node, int]] = {}
        for each in nested_graphs(gm):
            for node in each.graph.nodes:
                if (body := body_of(node)) is not None:
                    self._calls[body.graph] = node

    def call_of(self, graph: fx.Graph) -> fx.Node | None:
        """The node that calls the nested body with this graph, None for the outermost."""
        return self._calls.get(graph)

    def outer(self, node: fx.Node) -> fx.Node | None:
        """The node that a placeholder of a nested body is called with."""
        call = self._calls.get(node.graph)
        if call is None or node.op != "placeholder":
            return None
        if node.graph not in self._inputs:
            self._inputs[node.graph] = {n: i for i, n in enumerate(placeholders(node.graph))}
        operand = operands_of(call)[self._inputs[node.graph][node]]
        return operand if isinstance(operand, fx.Node) else None

    def outermost(self, node: fx.Node) -> fx.Node:
        """What a placeholder is called with, in the graph outside of all bodies."""
        outside = self.outer(node)
        return node if outside is None else self.outermost(outside)

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
        call = self._calls.get(node.graph)
        if call is None or getattr(call.target, "__name__", "") != "invoke_subgraph":
            return layer
        alike = [c for c in self._calls.values() if c.target is call.target]
        first = next(c for c in alike if c.args[1] == call.args[1])
        before, now = (self._around(c) for c in (first, call))
        while before and now and before[-1] == now[-1]:  # what the layers have in common
            before, now = before[:-1], now[:-1]
        parts = layer.split(".")
        inside = before and parts[: len(before)] == before
        return ".".join([*now, *parts[len(before) :]]) if inside else layer

    def _around(self, call: fx.Node) -> list[str]:
        """The parts of the name that all parameters share that a nested body is called with."""
        operands = (self.outermost(n) for n in operands_of(call) if isinstance(n, fx.Node))
        known = [self.name_of(n).split(".") for n in operands if input_name(n) is not None]
        columns = zip(*(parts for parts in known if len(parts) > 1), strict=False)
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, columns)
        return [names[0] for names in shared]

    def changed(self, graph: fx.Graph) -> None:
        """Says that the graph may have other inputs than before."""
        self._inputs.pop(graph, None)
