"""Brings groups of a graph's nodes together, each in one place, where that changes no result.

before  a0 .. write(a1) .. b0 .. write(b1)        groups {a0, a1's reader}, {b0, ..}
after   a group's nodes side by side, what only groups read right before them, and all others where
        they stood, as far as they can

What stays in order: a value before its readers; a write to memory after every earlier read and
before every later one; random numbers, and what processes do together, among themselves; an
autocast, and a node of unknown effects, between all that it stood between. Whether gradients are on
is no place in the graph but belongs to each node: where neighbours differ in it, it is switched.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence

from torch import fx

from moonfx.passes.graph.memory_versions import Memory, is_barrier, is_random
from moonfx.passes.graph.modes import switches_gradients
from moonfx.passes.graph.nodes import insert_with_meta
from moonfx.passes.graph.walks import reachable

Edges = dict[fx.Node, set[fx.Node]]
Group = dict[fx.Node, int]

# Operators of several processes, each of which must call them in the same order.
_TOGETHER = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor", "symm_mem")


def movable(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that an order is an order of."""
    return [node for node in graph.nodes if not switches_gradients(node)]


def predecessors(graph: fx.Graph, memory: Memory) -> Edges:
    """Each node -> the nodes that must run before it."""
    before: Edges = {}
    last_write: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    last_of: dict[str, fx.Node] = {}
    barrier: fx.Node | None = None
    since: list[fx.Node] = []
    for node in movable(graph):
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
        elif kind := _ordered_kind(node):
            needed.update([last_of[kind]] if kind in last_of else [])
            last_of[kind] = node
        since.append(node)
        needed.update([barrier] if barrier is not None else [])
        before[node] = needed - {node}
    return before


def _ordered_kind(node: fx.Node) -> str:
    """The kind of nodes that stay in order among themselves, of which this one is; "" for none."""
    if is_random(node):
        return "random"
    return "together" if getattr(node.target, "namespace", "") in _TOGETHER else ""


def depths(order: Sequence[fx.Node], before: Edges, group: Group) -> dict[int, int]:
    """For each group, how many groups follow one another before it.

    Groups of one depth do not depend on one another, and may become one. Groups are found in the
    order in which they can run; one that cannot stand in one place is not among them.
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


def separator(order: Sequence[fx.Node], before: Edges, members: set[fx.Node]) -> fx.Node | None:
    """The first node that must run after some of a group and before others of it."""
    last = max((i for i, node in enumerate(order) if node in members), default=-1)
    after: set[fx.Node] = set()
    for node in order[:last]:
        needed = before[node]
        if node not in members and not (needed.isdisjoint(after) and needed.isdisjoint(members)):
            after.add(node)
    ahead: set[fx.Node] = set()
    for node in reversed(order[: last + 1]):
        if node in members or node in ahead:
            ahead |= before[node]
    return next((node for node in order if node in after and node in ahead), None)


def schedule(
    order: Sequence[fx.Node], before: Edges, group: Group
) -> list[fx.Node | list[fx.Node]]:
    """The nodes in an order that `before` allows, each group as one list.

    A group stands where its last member did, and what only groups read waits for the first of them:
    so no more is alive at once than one group reads and makes. Others stay as near to the given
    order as they can. What depends on itself through a group is left out.
    """
    items: dict[Hashable, list[fx.Node]] = {}
    for node in order:
        items.setdefault(_item(node, group), []).append(node)
    needs: dict[Hashable, set[Hashable]] = {}
    for item, nodes in items.items():
        needs[item] = {_item(n, group) for node in nodes for n in before[node]} - {item}
    feeders = _feeders(order, before, group)
    place = {node: i for i, node in enumerate(order)}
    fed: dict[Hashable, list[fx.Node]] = {}  # each group -> the feeders that it needs
    needed: dict[Hashable, set[Hashable]] = {}  # each item but the feeders -> the same
    for item in items.keys() - feeders:
        needed[item] = needs[item] - feeders
        if isinstance(item, int):
            needed[item], fed[item] = _through(needs[item], needs, feeders)
    done: list[fx.Node | list[fx.Node]] = []
    placed: set[fx.Node] = set()
    for item in _sorted(needed, {item: place[items[item][-1]] for item in needed}):
        first = [n for n in sorted(fed.get(item, []), key=place.__getitem__) if n not in placed]
        placed.update(first)
        done += first
        done.append(items[item] if isinstance(item, int) else items[item][0])
    return done


def _sorted(
    needed: dict[Hashable, set[Hashable]], place: dict[Hashable, int]
) -> Iterator[Hashable]:
    """Items after all that they need, of those that could be next always the first by place.

    What needs itself, by way of others or not, is left out, and so is what needs that.
    """
    missing = {item: len(others) for item, others in needed.items()}
    after: dict[Hashable, list[Hashable]] = {}
    for item, others in needed.items():
        for other in others:
            after.setdefault(other, []).append(item)
    heap = [(place[item], item) for item, count in missing.items() if not count]
    heapq.heapify(heap)
    while heap:
        item = heapq.heappop(heap)[1]
        yield item
        for other in after.get(item, []):
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(heap, (place[other], other))


def _feeders(order: Sequence[fx.Node], before: Edges, group: Group) -> set[Hashable]:
    """The nodes that must only run before groups, or before others of them."""
    after: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        for other in before[node]:
            after.setdefault(other, []).append(node)
    found: set[Hashable] = set()
    for node in reversed(order):
        if node.op in ("placeholder", "output") or node in group:
            continue
        later = [n for n in after.get(node, []) if n.op != "output"]
        if later and all(n in group or n in found for n in later):
            found.add(node)
    return found


def _through(
    first: set[Hashable], needs: dict[Hashable, set[Hashable]], feeders: set[Hashable]
) -> tuple[set[Hashable], list[fx.Node]]:
    """What is needed that is no feeder, by way of feeders, and these."""
    reached = reachable(first, lambda item: needs[item] if item in feeders else ())
    return reached - feeders, [n for n in reached & feeders if isinstance(n, fx.Node)]


def _item(node: fx.Node, group: Group) -> Hashable:
    return group.get(node, node)


def reorder(graph: fx.Graph, order: Sequence[fx.Node | list[fx.Node]], start: bool) -> None:
    """Puts a graph's nodes into an order that has them all.

    A group, of which no node records a gradient, runs without where a node of it does.

    Args:
        start: whether gradients are on where the graph is entered.
    """
    wanted = _switched(graph)
    switches = [node for node in graph.nodes if switches_gradients(node)]
    count = sum(len(item) if isinstance(item, list) else 1 for item in order)
    if count != len(wanted):
        raise ValueError(f"an order of {count} nodes for a graph of {len(wanted)}")
    (output,) = (n for n in graph.nodes if n.op == "output")
    now: bool | None = None
    for item in order:
        nodes = item if isinstance(item, list) else [item]
        want = min((wanted[node] for node in nodes), key=(False, None, True).index)
        if want is not now and nodes[0].op not in ("placeholder", "get_attr"):
            value = start if want is None else want
            insert_with_meta(switches[0].target, (value,), output, switches[0].meta)
            now = want
        for node in nodes:
            if node is not output:
                output.prepend(node)
    for switch in switches:
        graph.erase_node(switch)


def _switched(graph: fx.Graph) -> dict[fx.Node, bool | None]:
    """Each node but the switches -> what gradients were switched to last, None for not yet."""
    found: dict[fx.Node, bool | None] = {}
    now = None
    for node in graph.nodes:
        if switches_gradients(node):
            now = bool(node.args[0])
        else:
            found[node] = now
    return found
