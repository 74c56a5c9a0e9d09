"""What is written otherwise while iterations are looked for, and becomes again what it was.

before  _foreach_mul_([x, y], 2.0)                        y.diagonal(..).add_(b)
after   mul_(x, 2.0); mul_(y, 2.0)  (`foreach`)           y2 = y + b I  (`diagonal_writes`)
"""

from torch import fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.newton_schulz.diagonal_writes import Diagonals
from moonfx.passes.newton_schulz.foreach import Rows


class Decomposition:
    """A graph's lists as rows and its writes to diagonals as sums.

    Args:
        graph: is changed, and computes what it did.
        distinct_inputs: see `Memory`.
    """

    def __init__(self, graph: fx.Graph, distinct_inputs: bool) -> None:
        self._graph, self._distinct_inputs = graph, distinct_inputs
        self._memory: Memory | None = None
        self._diagonals = Diagonals(graph, self.memory)
        try:
            if self._diagonals:
                self._memory = None
            self._rows = Rows(graph, self.memory)
        except Exception:
            self._diagonals.restore(set())
            raise
        if self._rows:
            self._memory = None

    def __bool__(self) -> bool:
        """Whether anything is written otherwise than it was."""
        return bool(self._rows or self._diagonals)

    @property
    def memory(self) -> Memory:
        """The memory of the graph as it stands now."""
        if self._memory is None:
            self._memory = Memory(self._graph, self._distinct_inputs)
        return self._memory

    def restore(self, kept: set[fx.Node]) -> None:
        """Writes all again as it was but for the nodes that are kept."""
        if self:
            self._memory = None
        self._rows.restore(kept)
        self._diagonals.restore(kept)

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stands for another since that was written as it was again."""
        return self._diagonals.current(self._rows.current(node))
