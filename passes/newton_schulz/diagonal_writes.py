"""Numbers added to the diagonal of a matrix in place, as sums with a multiple of the identity.

before  y.diagonal(dim1=-2, dim2=-1).add_(b); z = y @ s
after   y2 = y + b I; z = y2 @ s

A write through a view becomes a node, which a step can read. Sums that no iteration holds become
writes again.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import argument, axis, insert_with_meta, shape

aten = torch.ops.aten


class _Call(NamedTuple):
    """What is known of a call but for its first argument."""

    target: Any
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


class _Sum(NamedTuple):
    node: fx.Node
    view: _Call
    write: _Call

    @property
    def matrix(self) -> fx.Node:
        """What is added to, as it stands now: a row of a list may have come in its place."""
        matrix: Any = self.node.args[0]
        return matrix


class Diagonals:
    """The writes to diagonals of a graph, each as a sum.

    Args:
        graph: is changed, and computes what it did.
        memory: of the graph as it is given.
    """

    def __init__(self, graph: fx.Graph, memory: Memory) -> None:
        own = [node for node in graph.nodes if _is_own(node, memory)]
        self._current: dict[fx.Node, fx.Node] = {}
        self._sums = [_as_sum(node, memory) for node in own]

    def __bool__(self) -> bool:
        return bool(self._sums)

    def restore(self, kept: set[fx.Node]) -> None:
        """Makes writes again of the sums that are not kept; the order of nodes must not differ."""
        for each in self._sums:
            if each.node not in kept:
                self._current[each.node] = each.matrix
                _as_write(each)
        self._sums = [each for each in self._sums if each.node in kept]

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stands for a sum since it is a write again."""
        return self._current.get(node, node)


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
    of_eye = {**write.meta, "val": value.new_empty((m, m))}
    of_sum = {**write.meta, "val": torch.empty_like(value)}
    eye = insert_with_meta(aten.eye.default, (m,), write, of_eye, kind)
    node = insert_with_meta(aten.add.Tensor, (matrix, eye), write, of_sum, {"alpha": number})
    for user in list(matrix.users):
        if memory.position.get(user, -1) > memory.position[write]:
            user.replace_input_with(matrix, node)
    calls = [_Call(n.target, n.args[1:], dict(n.kwargs), n.meta) for n in (view, write)]
    for each in (write, view):
        write.graph.erase_node(each)
    return _Sum(node, *calls)


def _as_write(each: _Sum) -> None:
    matrix = written = each.matrix
    for call in (each.view, each.write):
        args = (written, *call.rest)
        written = insert_with_meta(call.target, args, each.node, call.meta, call.kwargs)
    eye: Any = each.node.args[1]
    each.node.replace_all_uses_with(matrix)
    for node in (each.node, eye):
        node.graph.erase_node(node)
