"""Operators on lists of tensors (torch._foreach_*), split into one operator for each row.

before  out = _foreach_mul([x, y], 2.0); a, b = out[0], out[1]     _foreach_add_([a, b], [x, y])
after   a = mul(x, 2.0); b = mul(y, 2.0)                           c = add_(a, x); d = add_(b, y)

A row of a list is then a node of its own, and who reads a row after it was written to in place
reads the node that wrote it. Rows that no iteration holds are joined again.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import insert_with_meta
from moonfx.passes.graph.walks import downstream, look_through
from moonfx.passes.newton_schulz.gram import factors
from moonfx.passes.newton_schulz.views import VIEWS

aten = torch.ops.aten


def _table(*names: str) -> dict[Any, Any]:
    """An operator on lists -> that on a row; of "packet: overloads on lists, overload on a row"."""
    found = {}
    for name in names:
        packet, lists, row = name.replace(":", ",").split(", ")
        for kind in (packet, f"{packet}_"):
            on_lists, on_row = getattr(aten, f"_foreach_{kind}", None), getattr(aten, kind, None)
            for each in lists.split():
                if hasattr(on_lists, each) and hasattr(on_row, row):
                    found[getattr(on_lists, each)] = getattr(on_row, row)
    return found


# Those that a step may hold: what they compute of a row is what the row's own operator computes.
ROW: dict[Any, Any] = _table(
    "add: Scalar List ScalarList Tensor, Tensor",
    "sub: Scalar List ScalarList, Tensor",
    "mul: Scalar List ScalarList Tensor, Tensor",
    "div: Scalar List ScalarList Tensor, Tensor",
    "lerp: Scalar ScalarList, Scalar",
    "lerp: List, Tensor",
    "neg: default, default",
    "clone: default, default",
    "mm: default, default",
) | {aten._foreach_copy_.default: aten.copy_.default}


class _List(NamedTuple):
    target: Any
    by_row: tuple[bool, ...]  # which arguments are lists
    rows: list[fx.Node]


class Rows:
    """The lists of a graph that an iteration may be made of, each as rows.

    Args:
        graph: is changed, and computes what it did.
        memory: of the graph as it is given.
    """

    def __init__(self, graph: fx.Graph, memory: Memory) -> None:
        self._current: dict[fx.Node, fx.Node] = {}
        lists = [n for n in _near_products(graph, memory) if _has_independent_rows(n, memory)]
        self._lists = [_split(node, memory) for node in lists]

    def __bool__(self) -> bool:
        return bool(self._lists)

    def restore(self, kept: set[fx.Node]) -> None:
        """Makes lists again of the rows that are not kept."""
        lists, self._lists = self._lists, []
        for each in reversed(lists):
            rest = [row for row in each.rows if row not in kept]
            if rest and (len(rest) > 1 or len(each.rows) == 1):
                self._current.update(_joined(each._replace(rows=rest)))
            if len(rest) < len(each.rows):
                ours = [row for row in each.rows if row in kept]
                self._lists.insert(0, each._replace(rows=ours))

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stands for a row since it was joined with others."""
        while node in self._current:
            node = self._current[node]
        return node


def _near_products(graph: fx.Graph, memory: Memory) -> list[fx.Node]:
    """Operators on lists that read, directly or not, what a product like X X^T is made of."""
    lists = [node for node in graph.nodes if node.target in ROW]
    start: list[fx.Node] = []
    for node in graph.nodes if lists else []:
        for left, right in _pairs(node):
            bases = [_base(n) for n in (left, right) if isinstance(n, fx.Node)]
            if len({memory.of(base) for base in bases}) == 1:
                start += bases
    reached = downstream(start)
    return [node for node in lists if node in reached]


def _pairs(node: fx.Node) -> list[tuple[Any, Any]]:
    """The pairs of matrices that a node multiplies."""
    if ROW.get(node.target) is aten.mm.default:
        return list(zip(*node.args, strict=True))
    found = factors(node)
    return [tuple(found[0])] if found is not None else []


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view or copy of."""
    while True:
        node = look_through(node, VIEWS)
        if node.target is not operator.getitem:
            return node
        clones, i = node.args
        if clones.target is not aten._foreach_clone.default:  # type: ignore[union-attr]
            return node
        node = clones.args[0][i]  # type: ignore[union-attr,index,assignment]


def _has_independent_rows(node: fx.Node, memory: Memory) -> bool:
    """Whether no row of a list depends on what is written to another's memory."""
    if any(user.target is not operator.getitem for user in node.users):
        return False
    ours: Any = node.args[0]
    if not memory.writes(node):
        return bool(ours)
    written = [memory.of(n) for n in ours]
    for i in range(len(ours)):
        read = [x[i] if isinstance(x, list | tuple) else x for x in node.args]
        roots = {memory.of(n) for n in read if isinstance(n, fx.Node)}
        if roots & {root for j, root in enumerate(written) if j != i}:
            return False
    return bool(ours)


def _split(node: fx.Node, memory: Memory) -> _List:
    by_row = tuple(isinstance(x, list | tuple) for x in node.args)
    ours: Any = node.args[0]
    written = bool(memory.writes(node))
    values = [n.meta.get("val") for n in ours] if written else node.meta["val"]
    rows = []
    for i, value in enumerate(values):
        args = tuple(x[i] if many else x for x, many in zip(node.args, by_row, strict=True))  # type: ignore[index]
        meta = {**node.meta, "val": value}
        rows.append(insert_with_meta(ROW[node.target], args, node, meta, dict(node.kwargs)))
    if written:
        at = memory.position[node]
        for name, row in zip(ours, rows, strict=True):
            for user in list(name.users):
                if memory.position.get(user, -1) > at:
                    user.replace_input_with(name, row)
    for part in list(node.users):
        part.replace_all_uses_with(rows[part.args[1]])  # type: ignore[index]
        node.graph.erase_node(part)
    node.graph.erase_node(node)
    return _List(node.target, by_row, rows)


def _joined(split: _List) -> dict[fx.Node, fx.Node]:
    """Each row -> what stands for it now."""
    first = split.rows[0]
    args = [
        [row.args[i] for row in split.rows] if many else first.args[i]
        for i, many in enumerate(split.by_row)
    ]
    written = bool(first.target._schema.is_mutable)  # type: ignore[union-attr]
    values = None if written else [row.meta["val"] for row in split.rows]
    meta = {**first.meta, "val": values}
    node = insert_with_meta(split.target, tuple(args), first, meta, dict(first.kwargs))
    current = {}
    for i, row in enumerate(split.rows):
        if written:
            current[row] = row.args[0]
        elif row.users:
            current[row] = insert_with_meta(operator.getitem, (node, i), first, row.meta)
        if row in current:
            row.replace_all_uses_with(current[row])  # type: ignore[arg-type]
    for row in split.rows:
        first.graph.erase_node(row)
    return current  # type: ignore[return-value]
