"""Replaces Newton-Schulz iterations by one operator per size, whoever wrote them.

before  A = X @ X.T;  X = a X + (b A + c A @ A) @ X      k times, for each of several matrices X
after   moonfx::newton_schulz(stack(X, ..), [a, b, c, ..]) once for all matrices of one size

X is already normalized, and stays so as its author wrote it. The coefficients are read from the
nodes. An iteration is replaced where it is proved that nothing else reads what it computes on the
way (`newton_schulz_chain`), and is computed with others where every read and write of the graph
can keep its place (`reorder`).
"""

import itertools
import math
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import module_path, source_line
from moonfx.capture.sizes import hint
from moonfx.passes.context import Context
from moonfx.passes.graph import node_order as reorder
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import insert, short
from moonfx.passes.newton_schulz import batching as plan
from moonfx.passes.newton_schulz.diagonal_writes import Diagonals
from moonfx.passes.newton_schulz.foreach import Rows
from moonfx.passes.newton_schulz.iterations import Chain, chains
from moonfx.passes.newton_schulz.steps import find_steps
from moonfx.site import Declined as Reject
from moonfx.site import NewtonSchulzSite

aten = torch.ops.aten
OPERATOR = torch.ops.moonfx.newton_schulz.default


def run(graph: fx.Graph, context: Context) -> int:
    """Returns how many iterations it replaced."""
    calls = [node for node in graph.nodes if node.target is OPERATOR]
    context.iterations += [_already(call, context) for call in calls]
    outer = context.nesting.call_of(graph) is None
    memory = Memory(graph, outer)
    rows: Rows | None = None
    diagonals = Diagonals(graph, memory)
    try:
        memory = Memory(graph, outer) if diagonals else memory
        rows = Rows(graph, memory)
        memory = Memory(graph, outer) if rows else memory
        found = chains(find_steps(graph, memory), memory, context)
        chosen = _chosen(found, rows, diagonals, graph, memory, context)
    except Exception:
        if rows is not None:
            rows.join(set())
        diagonals.restore(set())
        raise
    if chosen:
        _bring_together([members for members, _ in chosen], graph, Memory(graph, outer), context)
        _replace(chosen, graph)
        context.changed(graph)
    return sum(len(members) for members, _ in chosen)


Chosen = list[tuple[list[Chain], str]]  # what each call computes, and in which form


def _chosen(
    found: list[Chain],
    rows: Rows,
    diagonals: Diagonals,
    graph: fx.Graph,
    memory: Memory,
    context: Context,
) -> Chosen:
    """What is to be replaced, and a site for each that was found.

    All that is not stays as it was written, and so do lists of which it was a part: they may come
    between what else could stand in one place.
    """
    apart = bool(rows or diagonals)
    _join(rows, diagonals, found, [chain for chain in found if chain.reject is None])
    if not found:
        return []
    sites = {id(chain): _site(chain, context) for chain in found}
    legal = [chain for chain in found if chain.reject is None]
    while True:
        if apart:
            memory = Memory(graph, context.nesting.call_of(graph) is None)
        chosen: Chosen = []
        for members in _buckets(legal, graph, memory, sites):
            form, why = plan.form_of(members)
            for chain in members:
                sites[id(chain)].why = why
                sites[id(chain)].action = "rewritten" if form else "left"
            chosen += [(members, form)] if form else []
        kept = [chain for members, _ in chosen for chain in members]
        if len(kept) == len(legal) or not apart:
            break
        legal = [chain for chain in legal if any(chain is each for each in kept)]
        _join(rows, diagonals, found, legal)
    first = 1 + max((site.call or 0 for site in context.iterations), default=0)
    for number, (members, form) in enumerate(chosen, first):
        for chain in members:
            sites[id(chain)].form, sites[id(chain)].call = form, number
    context.iterations += sites.values()
    return chosen


def _join(rows: Rows, diagonals: Diagonals, found: list[Chain], replaced: list[Chain]) -> None:
    """Writes as it was what was taken apart and is in no iteration that is replaced."""
    kept = {node for chain in replaced for node in chain.body}
    rows.join(kept)
    diagonals.restore(kept)
    for chain in found:
        now = diagonals.now(rows.now(chain.source.node))
        chain.source = chain.source._replace(node=now)


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
        flops=plan.flops(chain) if chain.reject is None else 0,
        reject=chain.reject,
    )


def _already(call: fx.Node, context: Context) -> NewtonSchulzSite:
    """An iteration that was written as a call of the operator, as moonfx.Muon's is."""
    x, numbers = call.args[0].meta["val"], call.args[1]  # type: ignore[union-attr]
    return NewtonSchulzSite(
        output=call,
        shape=tuple(map(hint, x.shape)),
        dtype=x.dtype,
        device=x.device,
        coefficients=list(zip(*[iter(numbers)] * 3, strict=True)),  # type: ignore[arg-type]
        layer=module_path(call, context.names, context.root),
        line=source_line(call),
        action="left",
        why="it is the operator already",
    )


def _buckets(
    legal: list[Chain], graph: fx.Graph, memory: Memory, sites: dict[int, NewtonSchulzSite]
) -> list[list[Chain]]:
    """What may be computed by one call each; declines what cannot stand in one place."""
    before, order = reorder.predecessors(graph, memory), reorder.movable(graph)
    groups = {node: i for i, chain in enumerate(legal) for node in chain.body}
    depths = reorder.depths(order, before, groups)
    while len(depths) < len(set(groups.values())):
        for i, reject in _blocked(legal, set(groups.values()) - depths.keys(), order, before):
            sites[id(legal[i])].reject = legal[i].reject = reject
            groups = {node: j for node, j in groups.items() if j != i}
        depths = reorder.depths(order, before, groups)
    found: dict[Hashable, list[Chain]] = {}
    for i, chain in enumerate(legal):
        if i in depths:
            key = plan.key(chain, depths[i], memory.is_returned(chain.output))
            found.setdefault(key, []).append(chain)
    return list(itertools.chain.from_iterable(map(plan.calls, found.values())))


def _blocked(
    legal: list[Chain], late: set[int], order: list[fx.Node], before: reorder.Edges
) -> list[tuple[int, Reject]]:
    """Which iterations' steps cannot stand side by side, and why; of all that cannot be ordered.

    The others wait for these. Or else each can, and not with the next: the first is one too many.
    """
    nodes = {i: reorder.between(order, before, legal[i].body) for i in sorted(late)}
    found = [(i, node) for i, node in nodes.items() if node is not None]
    if found:
        return [(i, Reject(f"{short(n)} keeps its place between its steps", n)) for i, n in found]
    first = min(late)
    why = "other iterations keep their place between its steps"
    return [(first, Reject(why, legal[first].output))]


def _bring_together(
    buckets: list[list[Chain]], graph: fx.Graph, memory: Memory, context: Context
) -> None:
    groups = {n: i for i, chains in enumerate(buckets) for chain in chains for n in chain.body}
    order = reorder.schedule(reorder.movable(graph), reorder.predecessors(graph, memory), groups)
    reorder.apply(graph, order, context.mode(next(iter(graph.nodes))).gradients)
    context.changed(graph)


def _replace(chosen: list[tuple[list[Chain], str]], graph: fx.Graph) -> None:
    """Writes each call before the last of its members' nodes, and then takes these out.

    Where a call cannot be written, none is: the graph stays a whole one, other passes' work in it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    written = []
    try:
        for members, form in chosen:
            last = max((n for chain in members for n in chain.body), key=order.__getitem__)
            written.append(_call(members, form, last))
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
    """Checks that nobody would miss the nodes of iterations but for their results."""
    gone = {node for chain in replaced for node in chain.body}
    if len(gone) != sum(len(chain.body) for chain in replaced):
        raise RuntimeError("two iterations share nodes")
    for node in gone - {chain.output for chain in replaced}:
        if not gone.issuperset(node.users):
            raise RuntimeError(f"{node} is read by others than its iteration")


def _call(members: list[Chain], form: str, before: fx.Node) -> list[fx.Node]:
    """X_k of each member, in its own shape and strides, by one call of the operator."""

    def write(target: Any, *args: Any) -> fx.Node:
        return insert(target, args, before, members[0].output)

    m, n = plan.common_sides(members)
    batches = [tuple(chain.value.shape[:-2]) for chain in members]
    single = not any(batches)
    turned = [plan.turns(chain) ^ (plan.sides(chain) != (m, n)) for chain in members]
    operands = []
    for chain, batch, turn in zip(members, batches, turned, strict=True):
        x = write(aten.mT.default, chain.source.node) if turn else chain.source.node
        if not single and len(batch) != 1:
            x = write(aten.reshape.default, x, [-1, m, n])
        operands.append(x)
    numbers = [float(x) for step in members[0].coefficients for x in step]
    if len(members) == 1:
        results = [write(OPERATOR, operands[0], numbers, form)]
    else:
        whole = write(aten.stack.default if single else aten.cat.default, operands)
        out = write(OPERATOR, whole, numbers, form)
        counts = [math.prod(batch) for batch in batches]
        split = () if single else (counts,)
        parts = write(aten.unbind.int if single else aten.split_with_sizes.default, out, *split)
        results = [write(operator.getitem, parts, i) for i in range(len(members))]
    for i, (chain, batch, turn) in enumerate(zip(members, batches, turned, strict=True)):
        if not single and len(batch) != 1:
            results[i] = write(aten.reshape.default, results[i], [*batch, m, n])
        if chain.turned ^ turn ^ chain.column:  # X_k would lie otherwise than it did
            results[i] = write(aten.contiguous.default, write(aten.mT.default, results[i]))
        if chain.column:
            results[i] = write(aten.mT.default, results[i])
        if chain.own and results[i].meta["val"]._is_view():
            results[i] = write(aten.clone.default, results[i])
    return results
