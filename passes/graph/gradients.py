"""Through which nodes of a captured graph gradients may flow, and where they end."""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value, may_be_trained
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.modes import Mode
from moonfx.passes.graph.nesting import Nesting
from moonfx.passes.graph.operators import DETACHED
from moonfx.passes.graph.walks import upstream


class Gradients:
    """What is known of gradients in a captured graph and its bodies.

    Args:
        mode: the mode that a node runs under.
        frozen: whether an input is known to require no gradient.
    """

    def __init__(
        self,
        nesting: Nesting,
        mode: Callable[[fx.Node], Mode],
        frozen: Callable[[fx.Node], bool],
    ) -> None:
        self._nesting, self._mode, self._frozen = nesting, mode, frozen
        self._trained: dict[fx.Node, bool] = {}

    def needed(self, node: fx.Node, memory: Memory) -> bool:
        """Whether a gradient may flow through a node, also from what is written to its operands."""
        if not self._mode(node).gradients:
            return False
        return any(map(self._needs_it, self._floats_above(node, memory)))

    def _needs_it(self, node: fx.Node) -> bool:
        outside = self._nesting.outer(node)
        if outside is not None:
            memory = Memory(outside.graph, self._nesting.call_of(outside.graph) is None)
            return any(map(self._needs_it, self._floats_above(outside, memory)))
        return may_be_trained(node)

    def _is_trained(self, node: fx.Node) -> bool:
        """Whether floats are made of a parameter or of what the user passes in."""
        if node not in self._trained:
            self._trained[node] = any(map(self._may_be_trained, self._floats_above(node)))
        return self._trained[node]

    def _may_be_trained(self, node: fx.Node) -> bool:
        outside = self._nesting.outer(node)
        if outside is not None:
            return self._is_trained(outside)
        frozen = self._frozen(node) or buffer_value(node) is not None
        return node.op == "placeholder" and not frozen

    def _floats_above(self, node: fx.Node, memory: Memory | None = None) -> set[fx.Node]:
        """A node and what floating point tensors it is made of, in its graph.

        Args:
            memory: of the graph, to follow gradients: not through what is detached, and as well
                what is written, under gradients, through other names of the same memory before
                the node.
        """

        def inputs(current: fx.Node) -> Iterator[fx.Node]:
            if memory is None or current.target not in DETACHED:
                yield from current.all_input_nodes
            for writer in memory.writers(current, node) if memory is not None else ():
                if self._mode(writer).gradients:
                    yield from writer.all_input_nodes

        return upstream([node], stop=lambda n: not _has_floats(n.meta.get("val")), inputs=inputs)

    def end_at(self, node: fx.Node) -> bool:
        """Whether a node is made of what may be trained, but is not itself differentiable."""
        without = node.target in DETACHED or not self._mode(node).gradients
        return without and self._is_trained(node)


def _has_floats(value: object) -> bool:
    """Whether a value is a floating point tensor, or several results of which one is."""
    if isinstance(value, list | tuple):
        return any(map(_has_floats, value))
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
