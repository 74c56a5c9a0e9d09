"""Brings groups of a graph's nodes together, each in one place, where that changes no result.

before  a0 .. write(a1) .. b0 .. write(b1)        groups {a0, a1's reader}, {b0, ..}
after   the groups' nodes stand side by side; all others where they stood, as far as they can

What must stay in order: a value before who reads it; a write to memory after every earlier read and
before every later one; a change of mode or a random number before and after all that it was.
"""

import heapq
from collections.abc import Hashable, Sequence

from torch import fx

from moonfx.passes.memory import Memory, is_barrier

Edges = dict[fx.Node, set[fx.Node]]


def predecessors(graph: fx.Graph, memory: Memory) -> Edges:
    """Each node -> the nodes that must run before it."""
    before: Edges = {}
    last_write: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    barrier: fx.Node | None = None
    since: list[fx.Node] = []
    for node in graph.nodes:
        needed = set(node.all_input_nodes)
        touched = {memory.of(n) for n in node.all_input_nodes}
        written = {memory.of(n) for n in memory.writes(node)}
        for root in touched | written:
            needed.update([last_write[root]] if root in last_write else [])
            if root in written:
                needed.update(readers.pop(root, []))
                last_write[root] = node
            else:
                readers.setdefault(root, []).append(node)
        if is_barrier(node) or node.op == "output":
            needed.update(since)
            barrier, since = node, []
        since.append(node)
        needed.update([barrier] if barrier is not None else [])
        before[node] = needed - {node}
    return before


def depths(order: Sequence[fx.Node], before: Edges, group: dict[fx.Node, int]) -> dict[int, int]:
    """For each group, how many groups follow one another before it.

    Groups of one depth do not depend on one another, and may become one. Groups are found in the
    order in which they can run; one that cannot run as a whole is not among them.
    """
    found: dict[int, int] = {}
    depth: dict[Hashable, int] = {}
    for item in schedule(order, before, group):
        inside = item if isinstance(item, list) else [item]
        outside = {_item(n, group) for m in inside for n in before[m]} - {_item(inside[0], group)}
        own = max((depth[other] + isinstance(other, int) for other in outside), default=0)
        depth[_item(inside[0], group)] = own
        if inside[0] in group:
            found[group[inside[0]]] = own
    return found


def schedule(
    order: Sequence[fx.Node], before: Edges, group: dict[fx.Node, int]
) -> list[fx.Node | list[fx.Node]]:
    """The nodes in an order that `before` allows, each group as one list.

    Stays as near to the given order as it can, a group where its first member ends. What depends on
    itself through a group is left out.
    """
    items: dict[Hashable, list[fx.Node]] = {}
    for node in order:
        items.setdefault(_item(node, group), []).append(node)
    position = {node: i for i, node in enumerate(order)}
    waiting: dict[Hashable, int] = {}
    after: dict[Hashable, list[Hashable]] = {}
    for item, nodes in items.items():
        needed = {_item(n, group) for node in nodes for n in before[node]} - {item}
        waiting[item] = len(needed)
        for other in needed:
            after.setdefault(other, []).append(item)
    ready = [(position[nodes[0]], item) for item, nodes in items.items() if not waiting[item]]
    heap: list[tuple[int, int, Hashable]] = [(at, i, item) for i, (at, item) in enumerate(ready)]
    heapq.heapify(heap)
    done: list[fx.Node | list[fx.Node]] = []
    count = len(heap)
    while heap:
        item = heapq.heappop(heap)[2]
        nodes = items[item]
        done.append(nodes if isinstance(item, int) else nodes[0])
        for other in after.get(item, []):
            waiting[other] -= 1
            if not waiting[other]:
                count += 1
                heapq.heappush(heap, (position[items[other][0]], count, other))
    return done


def _item(node: fx.Node, group: dict[fx.Node, int]) -> Hashable:
    return group.get(node, node)


def apply(graph: fx.Graph, order: Sequence[fx.Node | list[fx.Node]]) -> None:
    """Puts the graph's nodes into an order that has them all."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    for item in order:
        for node in item if isinstance(item, list) else [item]:
            if node is not output:
                output.prepend(node)
