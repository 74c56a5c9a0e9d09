"""Whether query i and key i are the same token: self-attention, or cross-attention for all we know.

    x [B, N, C] -> linear -> view -> transpose -> rope -> query [B, H, N, D]
    x           -> linear -> view -> transpose -> rope -> key   [B, H, N, D]      the same x: proved

The token dim is followed back through operators that treat each token by itself. What the first
projection on every way reads is where tokens come from; a chain of projections and norms before it
may lead on (LoRA, latent attention). Tables of positions that are multiplied in are no source.

A tensor may be cut and joined along the features of a token, as query, key and value are from one
projection. Along any other dim that would be another row of the batch: x[:1] attends to x[1:].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import argument, permutation, shape
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.symbolic.view_rules import reshape_groups
from moonfx.site import AttentionSite

aten = torch.ops.aten

# A node, and which of its dims counts the tokens.
Place = tuple[fx.Node, int]

_UNARY = CASTS | {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.neg.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.elu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
}
_BINARY = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add_.Tensor,
    aten.mul_.Tensor,
    aten.div_.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
}
_LAST_DIM = {
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.linalg_vector_norm.default,
    aten.mean.dim,
}
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_CUTS = {  # operator -> where it names the dim that it cuts
    aten.slice.Tensor: (1, "dim", 0),
    aten.split.Tensor: (2, "dim", 0),
    aten.split.sizes: (2, "dim", 0),
    aten.split_with_sizes.default: (2, "dim", 0),
    aten.chunk.default: (2, "dim", 0),
}
_COMPLEX = {aten.view_as_complex.default, aten.view_as_real.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.convolution.default}
_WEIGHTED = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}


def same_tokens(site: AttentionSite, context: Context) -> bool:
    """Whether query and key are proved to come from the same tokens, in the same order."""
    key_dim = len(shape(site.key)) - (1 if site.key_transposed else 2)
    of_query = _sources((site.query, len(shape(site.query)) - 2), context)
    of_key = _sources((site.key, key_dim), context)
    if not of_query or not of_key:
        return False
    met = [any(q & k for k in of_key) for q in of_query]
    return all(met) and all(any(q & k for q in of_query) for k in of_key)


def _sources(start: Place, context: Context) -> list[frozenset[Place]]:
    """For each way back, the places that its first projection reads, or is made of in turn.

    Where no way meets a projection: where each way ends.
    """
    projected: list[frozenset[Place]] = []
    ends: list[frozenset[Place]] = []
    seen: set[Place] = set()
    stack = [start]
    while stack:
        place = _outermost(stack.pop(), context)
        if place in seen:
            continue
        seen.add(place)
        source = _projected(place)
        if source is not None:
            projected.append(frozenset(_chain(source, context)))
            continue
        before = list(_before(place))
        if before:
            stack += before
        else:
            ends.append(frozenset([place]))
    return projected or ends


def _chain(place: Place, context: Context) -> Iterator[Place]:
    """A place, and those before it, through projections and what keeps to one tensor of tokens."""
    while True:
        place = _outermost(place, context)
        yield place
        source = _projected(place)
        before = [source] if source is not None else list(_before(place))
        if len(set(before)) != 1:
            return
        place = before[0]


def _outermost(place: Place, context: Context) -> Place:
    """The same place outside of a nested body that it is an input of."""
    node, dim = place
    while node.op == "placeholder" and (outside := context.nesting.outer(node)) is not None:
        node = outside
    return node, dim


def _projected(place: Place) -> Place | None:
    """What a linear layer reads at a place, token for token."""
    node, dim = place
    if node.target not in _WEIGHTED:
        return None
    first = 1 if node.target is aten.addmm.default else 0
    source, weight = node.args[first : first + 2]
    if not (isinstance(source, fx.Node) and isinstance(weight, fx.Node)):
        return None
    if len(shape(weight)) != 2 or dim == len(shape(node)) - 1:
        return None
    return source, dim


def _before(place: Place) -> Iterator[Place]:
    """The operands that hold the same tokens in the same order, and the dim of the tokens there."""
    node, dim = place
    rank = len(shape(node))
    if node.op != "call_function" or not node.args:
        return
    source: Any = node.args[0]
    if node.target in _UNARY or (node.target in _LAST_DIM and dim != rank - 1):
        if isinstance(source, fx.Node) and len(shape(source)) == rank:
            yield source, dim
    elif node.target in _BINARY or node.target is aten.expand.default:
        operands = node.args[:1] if node.target is aten.expand.default else node.args[:2]
        for operand in operands:
            if isinstance(operand, fx.Node):
                sizes = shape(operand)
                at = dim - (rank - len(sizes))
                if at >= 0 and sizes[at] == shape(node)[dim]:
                    yield operand, at
    elif (order := permutation(node)) is not None:
        yield source, order[dim]
    elif node.target in _RESHAPES:
        yield from _reshaped(source, node, dim)
    elif getattr(node.target, "__name__", "") == "getitem":
        yield from _part(source, dim)
    elif node.target in _COMPLEX:
        if dim < min(rank, len(shape(source))) - (node.target is aten.view_as_real.default):
            yield source, dim
    elif node.target is aten.stack.default:
        if argument(node, 1, "dim", 0) % rank == rank - 1 != dim:
            yield from ((n, dim) for n in source)
    elif node.target is aten.select.int:
        at = argument(node, 1, "dim") % (rank + 1)
        if _of_features(source, at):
            yield source, dim + (at <= dim)
    elif node.target is aten.cat.default:
        if argument(node, 1, "dim", 0) % rank == rank - 1 != dim or len(set(source)) == 1:
            yield from ((n, dim) for n in source)
    elif node.target in _CUTS:
        yield from _cut(node, dim)


def _cut(node: fx.Node, dim: int) -> Iterator[Place]:
    """What slice, split or chunk cuts along the features, or not at all."""
    source: Any = node.args[0]
    target: Any = node.target
    sizes = shape(source)
    cut = argument(node, *_CUTS[target]) % len(sizes)
    whole = node.target is aten.slice.Tensor and shape(node)[cut] == sizes[cut]
    if cut != dim and (whole or cut == len(sizes) - 1 or _of_features(source, cut)):
        yield source, dim


def _part(source: Any, dim: int) -> Iterator[Place]:
    """One result of split, chunk or unbind."""
    if source.target is aten.unbind.int:
        inner = source.args[0]
        at = argument(source, 1, "dim", 0) % len(shape(inner))
        if _of_features(inner, at):
            yield inner, dim + (at <= dim)
    elif source.target in _CUTS:
        yield from _cut(source, dim)


def _of_features(node: Any, dim: int) -> bool:
    """Whether a dim counts features that a projection made, and no rows of a batch."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        source: Any = node.args[0]
        if node.target in _WEIGHTED:
            return dim == len(shape(node)) - 1
        if node.target in _CONVOLUTIONS:
            return dim == 1
        if (order := permutation(node)) is not None:
            dim = order[dim]
        elif node.target in _RESHAPES:
            before = list(_reshaped_from(source, node, dim))
            if len(before) != 1:
                return False
            (dim,) = before
        elif getattr(node.target, "__name__", "") == "getitem" and source.target in _CUTS:
            source = source.args[0]
        elif node.target is aten.select.int:
            dim += argument(node, 1, "dim") % len(shape(source)) <= dim
        elif not (node.target in _UNARY | _BINARY | _LAST_DIM or node.target in _CUTS):
            return False
        if not isinstance(source, fx.Node) or dim >= len(shape(source)):
            return False
        node = source
    return False


def _reshaped_from(source: fx.Node, node: fx.Node, dim: int) -> Iterator[int]:
    """The dims of `source`, of more than one element, that a dim of its reshape comes from."""
    for ins, outs in reshape_groups(shape(source), shape(node)) or []:
        if dim in outs:
            yield from (d for d in ins if shape(source)[d] != 1)


def _reshaped(source: fx.Node, node: fx.Node, dim: int) -> Iterator[Place]:
    """Through a reshape that leaves the token dim alone."""
    groups = reshape_groups(shape(source), shape(node))
    for ins, outs in groups or []:
        wide_in = [d for d in ins if shape(source)[d] != 1]
        wide_out = [d for d in outs if shape(node)[d] != 1]
        if wide_out == [dim] and len(wide_in) == 1:
            yield source, wide_in[0]
