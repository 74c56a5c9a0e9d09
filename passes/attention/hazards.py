"""What lies between an attention's operands and its output, and when and how it runs.

    before  query, key, value -> nodes at many places of the graph -> output
    after   query, key, value -> one operator at the output's place

The one operator reads its operands where the output stands, under the modes that hold there. That
is the same attention only if nothing was written to meanwhile, and if all of it ran with gradients
or none of it, and under one autocast.
"""

from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import origin
from moonfx.passes.graph.walks import downstream, upstream
from moonfx.site import AttentionSite, Declined


def between(site: AttentionSite) -> set[fx.Node]:
    """The nodes on the ways from query, key and value to the output, which is one of them.

    The ways that lead through a mask or a factor are left out: those are operands of their own.
    """
    ends = {origin(n) for n in (site.query, site.key, site.value)}
    others = [node for node, _ in (*site.masks, *site.factors)]
    if site.sink_logits is not None:
        others.append(site.sink_logits)
    stop = ends | {origin(n) for n in others}
    above = upstream([site.output], stop=stop.__contains__)
    first = [user for end in ends for user in end.users]
    return downstream(first, stop=lambda node: node not in above)


def check_writes(site: AttentionSite, context: Context) -> None:
    """Raises Declined for an operand written to between its first use and the operator's."""
    writes = context.writes(site.output.graph)
    path = between(site)
    named = [("query", site.query), ("key", site.key), ("value", site.value)]
    named += [("the scale", node) for node, _ in site.factors]
    if site.sink_logits is not None:
        named.append(("sink logits", site.sink_logits))
    operands = [(name, origin(node)) for name, node in named if origin(node) in writes]
    inner = [n for n in path if n is not site.output and writes.get(n, n) not in path]
    if not operands and not inner:
        return
    position = {node: i for i, node in enumerate(site.output.graph.nodes)}
    for name, node in operands:
        first_use = min((position[u] for u in node.users if u in path), default=0)
        if position[writes[node]] > first_use:
            written = f"{name} is written to in place after it was read; write to a copy"
            raise Declined(written, node)
    for node in inner:
        if position[writes[node]] > position[node]:
            raise Declined("a part of the attention is written to in place; write to a copy", node)


def check_modes(site: AttentionSite, context: Context) -> None:
    """Raises Declined if a part runs under torch.no_grad() or autocast, and a part does not."""
    here = context.mode(site.output)
    for node in sorted(between(site)):
        mode = context.mode(node)
        if mode.gradients != here.gradients:
            partly = "part of the attention is under torch.no_grad(); put all or none under it"
            raise Declined(partly, node)
        if mode.autocast != here.autocast:
            partly = "part of the attention is under another autocast; put all of it under one"
            raise Declined(partly, node)
