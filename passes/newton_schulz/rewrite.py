"""Replaces Newton-Schulz iterations by one operator per size, whoever wrote them.

before  A = X @ X.T;  X = a X + (b A + c A @ A) @ X      k times, for each of several matrices X
after   moonfx::newton_schulz(stack(X, ..), [a, b, c, ..]) once for all matrices of one size

X is already normalized, and stays so as its author wrote it. The coefficients are read from the
nodes. An iteration is replaced where it is proved that nothing else reads what it computes on the
way (`iterations`), and is computed with others where every read and write of the graph can keep its
place (`node_order`).
"""

import itertools
from collections.abc import Hashable

from torch import fx

from moonfx.capture.graph_nodes import module_path, source_line
from moonfx.capture.sizes import hint
from moonfx.passes.context import Context
from moonfx.passes.graph import node_order
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import arguments_of, operator_name
from moonfx.passes.newton_schulz import batching
from moonfx.passes.newton_schulz.decomposition import Decomposition
from moonfx.passes.newton_schulz.iterations import Chain, chains
from moonfx.passes.newton_schulz.operator_call import OPERATOR, write_call
from moonfx.passes.newton_schulz.steps import find_steps
from moonfx.site import Declined, NewtonSchulzSite


def run(graph: fx.Graph, context: Context) -> int:
    """Returns how many iterations it replaced."""
    calls = [node for node in graph.nodes if node.target is OPERATOR]
    context.iterations += [_existing_call(call, context) for call in calls]
    decomposed = Decomposition(graph, context.nesting.call_of(graph) is None)
    try:
        memory = decomposed.memory
        found = chains(find_steps(graph, memory), memory, context)
        chosen = _chosen(found, decomposed, graph, context)
    except Exception:
        decomposed.restore(set())
        raise
    if chosen:
        _bring_together([members for members, _ in chosen], graph, decomposed.memory, context)
        _replace(chosen, graph)
        context.changed(graph)
    return sum(len(members) for members, _ in chosen)


Chosen = list[tuple[list[Chain], str]]  # what each call computes, and in which form


def _chosen(
    found: list[Chain], decomposed: Decomposition, graph: fx.Graph, context: Context
) -> Chosen:
    """What is to be replaced, and a site for each that was found.

    An iteration that is not replaced becomes what it was again, and so do lists of which it was a
    part. A list may stand between nodes that could be brought together without it: what can be
    replaced is asked again, until all of it can.
    """
    was_decomposed = bool(decomposed)
    _restore(decomposed, found, [chain for chain in found if chain.reject is None])
    if not found:
        return []
    sites = {id(chain): _site(chain, context) for chain in found}
    legal = [chain for chain in found if chain.reject is None]
    while True:
        chosen: Chosen = []
        for members in _buckets(legal, graph, decomposed.memory, sites):
            form, why = batching.form_of(members)
            for chain in members:
                sites[id(chain)].why = why
                sites[id(chain)].action = "rewritten" if form else "left"
            chosen += [(members, form)] if form else []
        kept = [chain for members, _ in chosen for chain in members]
        if len(kept) == len(legal) or not was_decomposed:
            break
        legal = [chain for chain in legal if any(chain is each for each in kept)]
        _restore(decomposed, found, legal)
    first = 1 + max((site.call or 0 for site in context.iterations), default=0)
    for number, (members, form) in enumerate(chosen, first):
        for chain in members:
            sites[id(chain)].form, sites[id(chain)].call = form, number
    context.iterations += sites.values()
    return chosen


def _restore(decomposed: Decomposition, found: list[Chain], replaced: list[Chain]) -> None:
    """Writes lists and diagonals as they were again but for the nodes that are to be replaced."""
    decomposed.restore({node for chain in replaced for node in chain.body})
    for chain in found:
        chain.source = chain.source._replace(node=decomposed.current(chain.source.node))


def _site(chain: Chain, context: Context) -> NewtonSchulzSite:
    x, node = chain.source.node.meta["val"], chain.output
    return NewtonSchulzSite(
        output=node,
        shape=tuple(map(hint, x.shape)),
        dtype=x.dtype,
        device=x.device,
        coefficients=chain.coefficients,
        layer=module_path(node, context.names, context.root),
        line=source_line(node),
        flops=batching.flops(chain) if chain.reject is None else 0,
        reject=chain.reject,
    )


def _existing_call(call: fx.Node, context: Context) -> NewtonSchulzSite:
    """An iteration that was written as a call of the operator, as moonfx.Muon's is."""
    given = arguments_of(call)
    x, numbers = given["X"].meta["val"], given["coefficients"]
    return NewtonSchulzSite(
        output=call,
        shape=tuple(map(hint, x.shape)),
        dtype=x.dtype,
        device=x.device,
        coefficients=list(zip(*[iter(numbers)] * 3, strict=True)),
        layer=module_path(call, context.names, context.root),
        line=source_line(call),
        action="left",
        why="it is the operator already",
    )


def _buckets(
    legal: list[Chain], graph: fx.Graph, memory: Memory, sites: dict[int, NewtonSchulzSite]
) -> list[list[Chain]]:
    """The iterations that one call may compute, of each call; declines what it cannot move."""
    before, order = node_order.predecessors(graph, memory), node_order.movable(graph)
    groups = {node: i for i, chain in enumerate(legal) for node in chain.body}
    depths = node_order.depths(order, before, groups)
    while len(depths) < len(set(groups.values())):
        for i, reject in _blocked(legal, set(groups.values()) - depths.keys(), order, before):
            sites[id(legal[i])].reject = legal[i].reject = reject
            groups = {node: j for node, j in groups.items() if j != i}
        depths = node_order.depths(order, before, groups)
    found: dict[Hashable, list[Chain]] = {}
    for i, chain in enumerate(legal):
        if i in depths:
            key = batching.key(chain, depths[i], memory.is_returned(chain.output))
            found.setdefault(key, []).append(chain)
    return list(itertools.chain.from_iterable(map(batching.calls, found.values())))


def _blocked(
    legal: list[Chain], unplaced: set[int], order: list[fx.Node], before: node_order.Edges
) -> list[tuple[int, Declined]]:
    """Which of the iterations that are in no order stand in the way of that, and why.

    They are those whose own steps cannot stand side by side; others come after these. Where there
    is none, each can stand in one place, but not all of them: the first is declined.
    """
    nodes = {i: node_order.separator(order, before, legal[i].body) for i in sorted(unplaced)}
    found = [(i, node) for i, node in nodes.items() if node is not None]
    if found:
        why = "{} keeps its place between its steps"
        return [(i, Declined(why.format(operator_name(node)), node)) for i, node in found]
    first = min(unplaced)
    why = "other iterations keep their place between its steps"
    return [(first, Declined(why, legal[first].output))]


def _bring_together(
    buckets: list[list[Chain]], graph: fx.Graph, memory: Memory, context: Context
) -> None:
    groups = {n: i for i, chains in enumerate(buckets) for chain in chains for n in chain.body}
    before = node_order.predecessors(graph, memory)
    order = node_order.schedule(node_order.movable(graph), before, groups)
    node_order.reorder(graph, order, context.mode(next(iter(graph.nodes))).gradients)
    context.changed(graph)


def _replace(chosen: list[tuple[list[Chain], str]], graph: fx.Graph) -> None:
    """Writes each call before the last of its members' nodes, and then removes these.

    Where a call cannot be written, none is, and the graph is as the passes before left it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    written = []
    try:
        for members, form in chosen:
            last = max((n for chain in members for n in chain.body), key=order.__getitem__)
            written.append(write_call(members, form, last))
        _check_alone([chain for members, _ in chosen for chain in members])
    except Exception:
        for node in reversed(list(graph.nodes)):
            if node not in order:
                graph.erase_node(node)
        raise
    gone: list[fx.Node] = []
    for (members, _), results in zip(chosen, written, strict=True):
        for chain, result in zip(members, results, strict=True):
            chain.output.replace_all_uses_with(result)
            gone += chain.body
    for node in sorted(gone, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def _check_alone(replaced: list[Chain]) -> None:
    """Checks that only the iterations' results are read by other nodes."""
    gone = {node for chain in replaced for node in chain.body}
    if len(gone) != sum(len(chain.body) for chain in replaced):
        raise RuntimeError("two iterations share nodes")
    for node in gone - {chain.output for chain in replaced}:
        if not gone.issuperset(node.users):
            raise RuntimeError(f"{node} is read by others than its iteration")
