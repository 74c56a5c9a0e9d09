"""Numbers added to the diagonal of a matrix in place, as sums with a multiple of the identity.

before  y.diagonal(dim1=-2, dim2=-1).add_(b); z = y @ s
after   y2 = y + b I; z = y2 @ s

A step reads what was written through a view as a node of its own then. Sums that no iteration
holds become writes again.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import argument, axis, shape

aten = torch.ops.aten


class _Sum(NamedTuple):
    node: fx.Node
    matrix: fx.Node
    view: tuple[Any, ...]  # its operator, named arguments, meta, and the other arguments
    write: tuple[Any, ...]  # the first three of them
    number: float


class Diagonals:
    """The writes to diagonals of a graph, each as a sum.

    Args:
        graph: is changed, and computes what it did.
        memory: of the graph as it is given.
    """

    def __init__(self, graph: fx.Graph, memory: Memory) -> None:
        own = [node for node in graph.nodes if _is_own(node, memory)]
        self._now: dict[fx.Node, fx.Node] = {}
        self._sums = [_as_sum(node, memory) for node in own]

    def __bool__(self) -> bool:
        return bool(self._sums)

    def restore(self, kept: set[fx.Node]) -> None:
        """Makes writes of the sums again that are not kept; where nodes stand as they stood."""
        for each in self._sums:
            if each.node not in kept:
                _as_write(each)
                self._now[each.node] = each.matrix
        self._sums = [each for each in self._sums if each.node in kept]

    def now(self, node: fx.Node) -> fx.Node:
        """The node that stands for a sum since it is a write again."""
        return self._now.get(node, node)


def _is_own(write: fx.Node, memory: Memory) -> bool:
    """Whether a node adds a number to the diagonal of matrices that nothing else is a view of."""
    if write.target not in (aten.add_.Tensor, aten.add_.Scalar) or write.users:
        return False
    view, number = write.args[:2]
    if type(number) not in (int, float) or argument(write, 2, "alpha", 1) != 1:
        return False
    if not isinstance(view, fx.Node) or view.target is not aten.diagonal.default:
        return False
    matrix: Any = view.args[0]
    dims = [argument(view, 2, "dim1", 0), argument(view, 3, "dim2", 1)]
    rank = len(shape(matrix))
    if argument(view, 1, "offset", 0) or {axis(matrix, d) for d in dims} != {rank - 2, rank - 1}:
        return False
    value = matrix.meta["val"]
    m, n = value.shape[-2:]
    plain = type(m) is int and m == n and value.dtype.is_floating_point
    alone = {matrix, view, write} == set(memory.members[memory.of(matrix)])
    given = matrix.op != "call_function" or memory.is_shared(matrix)
    return plain and alone and not given


def _as_sum(write: fx.Node, memory: Memory) -> _Sum:
    view: Any = write.args[0]
    matrix: fx.Node = view.args[0]
    number: Any = write.args[1]
    value = matrix.meta["val"]
    m = value.shape[-1]
    kind = {"dtype": value.dtype, "device": value.device}
    with write.graph.inserting_before(write):
        eye = write.graph.call_function(aten.eye.default, (m,), kind)
        node = write.graph.call_function(aten.add.Tensor, (matrix, eye), {"alpha": number})
    node.meta.update(write.meta, val=torch.empty_like(value))
    eye.meta.update(write.meta, val=value.new_empty((m, m)))
    for user in list(matrix.users):
        if memory.position.get(user, -1) > memory.position[write]:
            user.replace_input_with(matrix, node)
    as_written = [(each.target, each.kwargs, each.meta) for each in (view, write)]
    rest = view.args[1:]
    for each in (write, view):
        write.graph.erase_node(each)
    return _Sum(node, matrix, (*as_written[0], rest), as_written[1], number)


def _as_write(each: _Sum) -> None:
    (to_view, how, of_view, rest), (to_write, by, of_write) = each.view, each.write
    graph = each.node.graph
    with graph.inserting_before(each.node):
        view = graph.call_function(to_view, (each.matrix, *rest), how)
        write = graph.call_function(to_write, (view, each.number), by)
    view.meta.update(of_view)
    write.meta.update(of_write)
    eye: Any = each.node.args[1]
    each.node.replace_all_uses_with(each.matrix)
    graph.erase_node(each.node)
    graph.erase_node(eye)
