"""Whether queries and keys are of the same tokens: self-attention, or it may be cross-attention.

    x [B, N, C] -> linear -> view -> transpose -> rope -> query [B, H, N, D]
    x           -> linear -> view -> transpose -> rope -> key   [B, H, N, D]    the same x: proved
    cat([of text, of image]), the query as well as the key    part by part: proved

Both are followed back token by token. They are of the same tokens if every way back from the query
comes to a place that the key is made of too, and every way back from the key to one of the query.
Tables of positions, and what else is made of no token, are no such way.

The graph is followed from its end: where a node is looked at, all ways to it are known.
"""

import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value, held_by_module
from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import is_opaque
from moonfx.passes.graph.operators import SHAPE_ONLY
from moonfx.passes.graph.walks import reachable, upstream
from moonfx.passes.masks.filled import filled_with
from moonfx.passes.masks.places import (
    PROJECTIONS,
    Place,
    all_tokens,
    before,
    factors,
    of_parts,
)
from moonfx.site import AttentionSite

aten = torch.ops.aten

_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}
# Of these some parts are followed, and the others are of other tokens.
_PARTS = {aten.cat.default, operator.getitem}

# Who is made of a place: one of them, both, or what both are made of.
_QUERY, _KEY, _SHARED = 1, 2, 4


def same_tokens(site: AttentionSite, context: Context) -> bool:
    """Whether query and key are proved to come from the same tokens, in the same order."""
    return bool(shared_tokens(queries_of(site), keys_of(site), context))


def queries_of(site: AttentionSite) -> Place:
    return all_tokens(site.query, -2)


def keys_of(site: AttentionSite) -> Place:
    return all_tokens(site.key, -1 if site.key_transposed else -2)


def shared_tokens(query: Place, key: Place, context: Context) -> list[fx.Node]:
    """The nodes where the tokens of a query and of a key are the same, in the same order.

    Empty if either may be made of anything else.
    """
    sides: dict[object, int] = {}
    queue: list[_Queued] = []
    shared: list[fx.Node] = []

    def reached(place: Place, side: int) -> None:
        if place.key not in sides:
            heapq.heappush(queue, _Queued(place, _depth(place.node, context)))
        sides[place.key] = sides.get(place.key, 0) | side

    def is_open(queued: _Queued) -> bool:
        return sides[queued.place.key] in (_QUERY, _KEY)

    reached(query, _QUERY)
    reached(key, _KEY)
    while any(map(is_open, queue)):
        queued = heapq.heappop(queue)
        node, side = queued.place.node, sides[queued.place.key]
        above = list(_above(queued.place, context))
        if is_open(queued):
            if not above and not is_table(node, context):
                return []
        elif side != _SHARED:
            shared.append(node)
        for place in above:
            reached(place, side if is_open(queued) else _SHARED)
    shared += [q.place.node for q in queue if sides[q.place.key] != _SHARED]
    return [] if any(_changes(node, context) for node in shared) else shared


def is_table(node: fx.Node, context: Context) -> bool:
    """Whether a tensor is made of positions and of what modules hold, and of no token."""
    return not tokens_above([node], context)


def tokens_above(
    start: list[fx.Node], context: Context, *, through_steps: bool = True
) -> set[fx.Node]:
    """The inputs of the graph and embeddings that nodes are made of, whatever is done to them.

    Args:
        through_steps: False stops at attention that is causal.
    """
    causal = {site.output for site in context.sites if _causal(site)}

    def inputs(node: fx.Node) -> list[fx.Node]:
        outside = context.nesting.outer(node)
        if outside is not None:
            return [outside]
        stops = node.target in SHAPE_ONLY or (node in causal and not through_steps)
        return [] if stops or _is_token(node, context) else node.all_input_nodes

    return {n for n in upstream(start, inputs=inputs) if _is_token(n, context)}


def tokens_of(place: Place, context: Context) -> set[fx.Node]:
    """As `tokens_above`, of what some tokens alone are made of."""
    made_of: list[fx.Node] = []
    for each in reachable([place], lambda p: _above(p, context)):
        node, above = each.node, {p.node for p in _above(each, context)}
        if not above:
            made_of.append(node)
        elif not (node.target in _PARTS or _changes(node, context)):
            made_of += set(node.all_input_nodes) - above  # the same for all of them
    return tokens_above(made_of, context)


def _is_token(node: fx.Node, context: Context) -> bool:
    """Whether a node is where tokens come from; positions are numbers, or looked up in a buffer."""
    if node.target in _LOOKUPS:
        table = context.nesting.outermost(node.args[0])  # type: ignore[arg-type]
        of_module = held_by_module(table) or node.target is aten.embedding.default
        return of_module and isinstance(buffer_value(table), torch.nn.Parameter | None)
    if node.op != "placeholder" or context.nesting.outer(node) is not None:
        return is_opaque(node)
    value = node.meta.get("val")
    floats = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return floats and not held_by_module(node)


def _above(place: Place, context: Context) -> Iterator[Place]:
    """The places that one is made of: outside of a nested body, and as queries of attention."""
    node = place.node
    if (outside := context.nesting.outer(node)) is not None:
        yield replace(place, node=outside)
        return
    for site in context.sites:
        if site.output is node and _causal(site):
            yield replace(place, node=site.query)
            return
    if _changes(node, context):  # what it is depends on when it is read
        yield from of_parts(place, filled_with(node, context))
    elif not _mixes(node, context):
        yield from before(place)


def _mixes(node: fx.Node, context: Context) -> bool:
    """Whether a product is no projection but a sum of tokens: their tensor is its second operand.

    A weight that is given as an input looks like tokens, but what it meets is made of others.
    """
    if node.target not in PROJECTIONS:
        return False
    rows, matrix = factors(node)
    tokens = tokens_above([matrix], context)
    if not tokens:
        return False
    others = tokens_above([rows], context)
    return not others or not tokens.isdisjoint(others)


def _changes(node: fx.Node, context: Context) -> bool:
    """Whether a tensor is written to after it was made."""
    return context.mutated(node) and node < context.writes(node.graph)[node]


def _causal(site: AttentionSite) -> bool:
    return site.mask is not None and site.mask.causal


def _depth(node: fx.Node, context: Context) -> int:
    call = context.nesting.call_of(node.graph)
    return 0 if call is None else 1 + _depth(call, context)


@dataclass
class _Queued:
    """A place that is looked at before all that it is made of."""

    place: Place
    depth: int

    def __lt__(self, other: "_Queued") -> bool:
        if self.depth != other.depth or self.place.node.graph is not other.place.node.graph:
            return self.depth > other.depth
        return other.place.node < self.place.node
