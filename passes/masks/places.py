"""Where the tokens of a tensor come from, one operator at a time.

    x [B, N, C] -> linear -> view [B, N, H, D] -> transpose -> q [B, H, N, D]
    q's token n, in row b, is made of x's

A place is a tensor, where among its dims its rows of the batch and its tokens lie, and which of its
tokens are meant. `before` says of which places an operator makes them: each has the same rows and
tokens, in the same order, whatever became of the features of a token. An operator that mixes
tokens, or that has no rule in the table at the end, is made of no place.

Shape letters: B batch, H heads, N tokens, C and D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.capture.sizes import expression
from moonfx.passes.graph.nodes import argument, arguments_of, permutation, shape
from moonfx.passes.graph.operators import (
    CASTS,
    COPIES,
    DETACHED,
    DROPOUT,
    FILLS,
    FOLDS,
    SLICES,
    SWAPS,
    TRANSPOSES,
)
from moonfx.passes.masks.pieces import Axis, Piece, all_of, before_reshape, no_dim
from moonfx.passes.symbolic.expressions import Expr

aten = torch.ops.aten
Move = Callable[[int, Piece], Axis]


@dataclass(frozen=True)
class Place:
    """Tokens of a tensor.

    Args:
        rows: what counts rows of the batch.
        tokens: what counts tokens; nothing where one token has no dim of its own.
        first, count: which tokens are meant, counted along `tokens`.
        at: which token of the attention the first of them is.
    """

    node: fx.Node
    rows: Axis
    tokens: Axis
    first: Expr
    count: Expr
    at: Expr = sympy.S.Zero

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two places only if they are the same tokens of the same rows."""
        rows = [p for p in self.rows if p.size != 1]
        while rows and rows[-1].dim is None:  # heads
            rows.pop()
        tokens = tuple(p for p in self.tokens if p.size != 1)
        return self.node, tuple(rows), tokens, self.first, self.count, self.at


class _Lost(Exception):
    """Rows or tokens that cannot be followed through an operator."""


def all_tokens(node: fx.Node, dim: int) -> Place:
    """The tokens that a dim counts, in rows that the first dim counts."""
    sizes = shape(node)
    tokens = all_of(dim % len(sizes), sizes[dim])
    return Place(node, (all_of(0, sizes[0]),), (tokens,), sympy.S.Zero, sizes[dim])


def before(place: Place) -> list[Place]:
    """The places that these tokens are made of; none where that is not known."""
    node = place.node
    if node.op != "call_function" or not node.args:
        return []
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _elementwise
    if rule is None and getattr(node.target, "__name__", "") == "getitem":
        rule = _part
    try:
        return [] if rule is None else list(rule(place))
    except _Lost:
        return []


def of_parts(place: Place, parts: list[fx.Node]) -> list[Place]:
    """The places that these tokens are made of where a tensor's features are those of the parts."""
    try:
        return [found for part in parts for found in _broadcast(place, part)]
    except _Lost:
        return []


def of_features(node: fx.Node, dim: int) -> bool:
    """Whether a dim counts features of a token: it is the last, or was made by a projection."""
    sizes = shape(node)
    if dim == len(sizes) - 1:
        return True
    ways, seen = [Place(node, (all_of(dim, sizes[dim]),), (), sympy.S.Zero, sympy.S.One)], set()
    while ways:
        place = ways.pop()
        if place in seen or all(p.dim is None for p in place.rows):
            continue
        seen.add(place)
        above = before(place)
        if not above:
            return False
        ways += above
    return True


def _follow(place: Place, source: object, move: Move) -> Place:
    """The same tokens in an operand: each piece is where `move` finds it."""
    if not isinstance(source, fx.Node):
        raise _Lost

    def moved(axis: Axis) -> Axis:
        return tuple(q for p in axis for q in ((p,) if p.dim is None else move(p.dim, p)))

    return replace(place, node=source, rows=moved(place.rows), tokens=moved(place.tokens))


def _dims(place: Place) -> set[int | None]:
    return {p.dim for p in place.rows + place.tokens} - {None}


def _stays(dim: int, piece: Piece) -> Axis:
    return (piece,)


# --- one rule for each kind of operator -----------------------------------------------------------


def _elementwise(place: Place) -> Iterator[Place]:
    """All operands that tell the tokens apart; what is the same for each is of no token."""
    for operand in place.node.all_input_nodes:
        if isinstance(operand.meta.get("val"), torch.Tensor):
            yield from _broadcast(place, operand)


def _first_elementwise(place: Place) -> Iterator[Place]:
    yield from _broadcast(place, place.node.args[0])


def _broadcast(place: Place, source: Any, *, equal: bool = True) -> Iterator[Place]:
    """An operand that is aligned with the result from the last dim on.

    Args:
        equal: whether the operator needs sizes other than 1 to be equal, whatever they go by.
    """
    own, sizes = shape(place.node), shape(source)

    def move(dim: int, piece: Piece) -> Axis:
        at = dim - (len(own) - len(sizes))
        if at < 0 or (sizes[at] == 1 != own[dim]):
            return (no_dim(piece.size),)
        if own[dim] == sizes[at]:
            return (piece._replace(dim=at),)
        if equal and piece == all_of(dim, own[dim]):
            return (all_of(at, sizes[at]),)
        raise _Lost

    found = _follow(place, source, move)
    if all(p.dim is not None or p.size == 1 for p in found.tokens):
        yield found


def _over_last(place: Place) -> Iterator[Place]:
    """Norms and sums over features, which keep the dims."""
    given, rank = arguments_of(place.node), len(shape(place.node))
    over = given.get("dim", [-1 - d for d in range(len(given.get("normalized_shape", ())))])
    over = [over] if isinstance(over, int) else over or range(rank)
    source: Any = place.node.args[0]
    if len(shape(source)) != rank or _dims(place) & {d % rank for d in over}:
        raise _Lost
    yield from _first_elementwise(place)


def factors(node: fx.Node) -> list[Any]:
    """The two operands that a projection is the product of: rows, and the matrix that they meet."""
    first = 1 if node.target is aten.addmm.default else 0
    return list(node.args[first : first + 2])


def _projection(place: Place) -> Iterator[Place]:
    """x @ weight, each row of which is made of the same row of x, and of what is added to it."""
    node = place.node
    last = len(shape(node)) - 1
    ranks = [len(shape(n)) for n in factors(node) if isinstance(n, fx.Node)]
    if ranks != [last + 1, 2] or any(p.dim == last for p in place.tokens):
        raise _Lost
    rows = _follow(place, node, lambda dim, p: (no_dim(p.size),) if dim == last else (p,))
    yield replace(rows, node=factors(node)[0])
    added = node.args[0] if node.target is aten.addmm.default else argument(node, 2, "bias")
    if isinstance(added, fx.Node) and len(shape(added)) > 1:
        yield from _broadcast(rows, added)


def _convolution(place: Place) -> Iterator[Place]:
    """Its channels are features of what it sees; of what else it makes is not followed."""
    if place.tokens or [p.dim for p in place.rows] != [1]:
        raise _Lost
    yield _follow(place, place.node.args[0], lambda dim, p: (no_dim(p.size),))


def _permuted(place: Place) -> Iterator[Place]:
    order = permutation(place.node)
    if order is None:
        raise _Lost
    yield _follow(place, place.node.args[0], lambda dim, p: (p._replace(dim=order[dim]),))


def _reshaped(place: Place) -> Iterator[Place]:
    source: Any = place.node.args[0]
    sizes, own = tuple(shape(source)), tuple(shape(place.node))

    def move(dim: int, piece: Piece) -> Axis:
        found = before_reshape(piece, sizes, own)
        if found is None:
            raise _Lost
        return found

    yield _follow(place, source, move)


def _repeated(place: Place) -> Iterator[Place]:
    """Where neither rows nor tokens are repeated."""
    if not isinstance(argument(place.node, 2, "dim", 0), int):
        raise _Lost
    yield from _broadcast(place, place.node.args[0], equal=False)


def _complex(place: Place) -> Iterator[Place]:
    """Pairs of features as numbers, or back."""
    source: Any = place.node.args[0]
    rank = min(len(shape(source)), len(shape(place.node)))
    if not _dims(place) <= set(range(rank)):
        raise _Lost
    yield _follow(place, source, _stays)


def _select(place: Place) -> Iterator[Place]:
    yield _chosen(place, place.node.args[0], argument(place.node, 1, "dim"))


def _chosen(place: Place, source: Any, dim: int) -> Place:
    """One index of a dim of features."""
    dim %= len(shape(source))
    if not of_features(source, dim):
        raise _Lost
    return _follow(place, source, lambda d, p: (p._replace(dim=d + (dim <= d)),))


def _gathered(place: Place) -> Iterator[Place]:
    """x[:, :, [2, 0]]: some features, by one list of them."""
    given: Any = argument(place.node, 1, "indices")
    source: Any = place.node.args[0]
    (dim, *others) = [d for d, index in enumerate(given) if index is not None] or [-1]
    if others or dim < 0 or len(shape(given[dim])) != 1:
        raise _Lost
    yield _cut(place, source, dim, None)


def _slice(place: Place) -> Iterator[Place]:
    node = place.node
    source: Any = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(shape(source))
    start = argument(node, 2, "start") or 0
    begin = expression(start.meta["val"] if isinstance(start, fx.Node) else start)
    size, taken = shape(source)[dim], shape(node)[dim]
    if begin.is_negative and taken == -begin:  # the last ones
        begin = sympy.expand(size - taken)
    steps = node.target is aten.slice.Tensor and argument(node, 4, "step", 1) != 1
    begin = sympy.S.Zero if taken == size else begin  # all of it, whatever it starts from
    yield _cut(place, source, dim, None if steps or not begin.is_nonnegative else begin)


def _part(place: Place) -> Iterator[Place]:
    """One result of split, chunk or unbind."""
    call, index = place.node.args[:2]
    assert isinstance(call, fx.Node)
    if call.target is aten.unbind.int:
        yield _chosen(place, call.args[0], argument(call, 1, "dim", 0))
    elif call.target in _SPLITS and isinstance(index, int) and index >= 0:
        source: Any = call.args[0]
        dim = argument(call, 2, "dim", 0) % len(shape(source))
        sizes = [expression(v.shape[dim]) for v in call.meta["val"][:index]]
        yield _cut(place, source, dim, sympy.Add(*sizes))


def _cut(place: Place, source: fx.Node, dim: int, begin: Expr | None) -> Place:
    """Some of a dim, from `begin` on, None if that is not known: of features, or of tokens."""
    size, taken = shape(source)[dim], shape(place.node)[dim]
    if (taken == size and begin == 0) or (dim not in _dims(place) and of_features(source, dim)):
        return _follow(place, source, _stays)
    if begin is None or place.tokens != (all_of(dim, taken),):
        raise _Lost
    first = sympy.expand(place.first + begin)
    return replace(place, node=source, tokens=(all_of(dim, size),), first=first)


def _join(place: Place) -> Iterator[Place]:
    """cat: along features, of equal parts, or along the tokens."""
    given: Any = place.node.args[0]
    parts = [p for p in given if shape(p) != [0]]  # a cache that is still empty
    dim = argument(place.node, 1, "dim", 0) % len(shape(place.node))
    aside = replace(place, tokens=tuple(p for p in place.tokens if p.dim != dim))
    if dim in _dims(aside):
        raise _Lost
    beside = [found for part in parts for found in _broadcast(aside, part)]
    if len(beside) != len(parts):
        raise _Lost
    if aside == place:
        if len(set(parts)) > 1 and not all(of_features(p, dim) for p in parts):
            raise _Lost
        yield from beside
        return
    if place.tokens != (all_of(dim, shape(place.node)[dim]),):
        raise _Lost
    start: Expr = sympy.S.Zero
    for found in beside:
        tokens = all_of(dim, shape(found.node)[dim])
        yield from _overlap(replace(found, tokens=(tokens,)), start)
        start = sympy.expand(start + tokens.size)


def _overlap(part: Place, start: Expr) -> Iterator[Place]:
    """Those tokens that are meant and lie in a part of a cat that starts there."""
    length = part.tokens[0].size
    earlier = sympy.expand(start - part.first)  # of those meant
    left = sympy.expand(part.count - earlier)
    if left.is_nonpositive or sympy.expand(earlier + length).is_nonpositive:
        return
    first = _larger(-earlier, sympy.S.Zero)
    end = sympy.expand(-_larger(-left, -length))
    at = sympy.expand(part.at + earlier + first)
    yield replace(part, first=first, count=sympy.expand(end - first), at=at)


def _larger(a: Expr, b: Expr) -> Expr:
    for one, other in ((a, b), (b, a)):
        if sympy.expand(one - other).is_nonnegative:
            return one
    raise _Lost


def _stack(place: Place) -> Iterator[Place]:
    """A new dim, of features or of equal parts."""
    parts: Any = place.node.args[0]
    last = len(shape(place.node)) - 1
    new = argument(place.node, 1, "dim", 0) % (last + 1)
    if new in _dims(place) or (new != last and len(set(parts)) > 1):
        raise _Lost
    for part in parts:
        yield _follow(place, part, lambda dim, p: (p._replace(dim=dim - (new < dim)),))


_SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
}
PROJECTIONS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
_KINDS: list[tuple[Callable[[Place], Iterator[Place]], set[Any]]] = [
    (_elementwise, FILLS),
    (_first_elementwise, CASTS | COPIES | DETACHED | DROPOUT | {aten.expand.default}),
    (_over_last, {aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int}),
    (_over_last, {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}),
    (_over_last, {aten.linalg_vector_norm.default}),
    (_projection, PROJECTIONS),
    (_convolution, {aten.conv1d.default, aten.conv2d.default, aten.convolution.default}),
    (_permuted, SWAPS | TRANSPOSES | {aten.permute.default, aten.movedim.int}),
    (_reshaped, FOLDS | {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}),
    (_reshaped, {aten.unsqueeze.default}),
    (_repeated, {aten.repeat.default, aten.repeat_interleave.self_int}),
    (_complex, {aten.view_as_complex.default, aten.view_as_real.default}),
    (_select, {aten.select.int}),
    (_gathered, {aten.index.Tensor}),
    (_slice, SLICES),
    (_join, {aten.cat.default}),
    (_stack, {aten.stack.default}),
]
_RULES = {operator: rule for rule, operators in _KINDS for operator in operators}
