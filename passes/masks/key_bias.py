"""Reduces a bias to the part that changes the softmax, if that depends on the key alone.

    before  slope[h] * (j - i)          query i, key j, head h
    after   slope[h] * j                less by slope[h] * i for every key of a query

softmax(x + c) = softmax(x), so that what depends on the query alone may go; beside attention sink
logits it may not, because these do not shift along. |i - j| is i - j where no later key is
seen. What depends on query and key together (T5's buckets, a learned table) is declined.
"""

from dataclasses import dataclass, field

import sympy
from torch import fx

from moonfx.capture.graph_nodes import input_name
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.masks.additive import MASKED_BESIDE_BIAS, Added
from moonfx.passes.symbolic.expressions import MASKED_BELOW, Expr, describe, loads, name_of
from moonfx.passes.symbolic.indices import HEAD, KEY, QUERY, Lengths
from moonfx.passes.symbolic.reader import Reader
from moonfx.passes.symbolic.rules import VIEWS


class NotByKey(Exception):
    """A bias that is not one number per head and key, with the reason."""


@dataclass(frozen=True)
class Bias:
    """An additive bias of the keys.

    Args:
        value: over (batch, head, key).
        name: for the report.
    """

    value: Expr
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass
class Parts:
    """The terms of a bias by what they depend on."""

    key: list[Expr] = field(default_factory=list)
    query: list[Expr] = field(default_factory=list)
    neither: list[Expr] = field(default_factory=list)


def by_key(
    added: Added, lengths: Lengths, reader: Reader, *, causal: bool, sink: bool
) -> tuple[Bias | None, list[Expr]]:
    """The bias of an added value, and the conditions under which a key is real because of it.

    A value per row and key that the graph does not know (a float mask given by the user) is both: a
    mask where it is far below every score, and a bias elsewhere.

    Args:
        causal: whether the masks hide the later keys of a query.
        sink: whether sink logits join the softmax.
    Raises:
        NotByKey: if the bias depends on query and key together, or may be a mask of one head.
    """
    bias = _signed(sympy.expand(added.bias), lengths, causal=causal)
    parts = _parts(sympy.expand(bias))
    key = sympy.Add(*parts.key)
    _check_query_terms(sympy.Add(*parts.query), key, lengths)
    if sink:
        if parts.query:
            raise NotByKey("a bias of whole queries, which attention sink logits do not share")
        key += sympy.Add(*parts.neither)
    if key == 0:
        return None, []
    if added.weakest > MASKED_BESIDE_BIAS:
        raise NotByKey(
            f"keys are hidden by adding {describe(added.weakest)}, which a bias may outweigh"
        )
    masks = [t for t in parts.key if not t.has(HEAD) and _unknown_keys(t, reader)]
    for term in parts.key:
        for load in loads(term):
            if term.has(HEAD) and load.has(KEY) and _given(load, reader):
                differs = f"the mask '{name_of(load)}' differs by head"
                raise NotByKey(f"{differs}; one mask for all heads can be proved")
    conditions = [_far_above(sympy.Add(*masks))] if masks else []
    if not sink:
        key = _from_last_key(key, lengths)
    return Bias(key, "ALiBi" if key.has(HEAD) else "key bias"), conditions


def _signed(bias: Expr, lengths: Lengths, *, causal: bool) -> Expr:
    """Resolves |x|, max and min of what a causal mask gives a sign."""

    def sign(x: Expr) -> int:
        x = sympy.expand(x)
        if x.is_nonnegative or x.is_nonpositive:
            return 1 if x.is_nonnegative else -1
        by_query, by_key = x.coeff(QUERY), x.coeff(KEY)
        if not (by_query.is_number and by_key.is_number):
            return 0
        if not ((by_query == -by_key and causal) or (by_query == 0 and lengths.one_query)):
            return 0
        for offset in lengths.offsets:
            # i - j + offset >= 0 for each key that a query sees
            rest = sympy.expand(x - by_query * QUERY - by_key * (KEY - offset))
            if -by_key >= 0 and rest.is_nonnegative:
                return 1
            if -by_key <= 0 and rest.is_nonpositive:
                return -1
        return 0

    for found in sorted(bias.atoms(sympy.Abs, sympy.Max, sympy.Min), key=sympy.count_ops):
        if isinstance(found, sympy.Abs):
            known = {1: found.args[0], -1: -found.args[0]}.get(sign(found.args[0]))
        elif len(found.args) == 2:
            first, second = found.args
            larger = {1: first, -1: second}.get(sign(first - second))
            smaller = {1: second, -1: first}.get(sign(first - second))
            known = larger if isinstance(found, sympy.Max) else smaller
        else:
            known = None
        if known is not None:
            bias = bias.subs(found, known)
    return bias


def _parts(bias: Expr) -> Parts:
    parts = Parts()
    for term in sympy.Add.make_args(bias):
        by_query, by_key = term.has(QUERY), term.has(KEY)
        if by_query and by_key:
            raise NotByKey(_together(term))
        kind = parts.query if by_query else parts.key if by_key else parts.neither
        kind.append(term)
    return parts


_NOT_BY_KEY = "depends on query and key together; a bias of the keys alone, as ALiBi, can be sparse"


def _together(term: Expr) -> str:
    both = [x for x in loads(term) if x.has(QUERY) and x.has(KEY)]
    if both:
        return f"relative position bias '{name_of(both[0])}' {_NOT_BY_KEY}"
    if term.has(sympy.Abs):
        return (
            f"relative position bias {describe(term)} depends on query and key together: |i - j| "
            "does, unless a causal mask hides the later keys of each query"
        )
    return f"relative position bias {describe(term)} {_NOT_BY_KEY}"


def _check_query_terms(query: Expr, key: Expr, lengths: Lengths) -> None:
    """What only shifts a query's scores must be finite: positions, or what the keys have too."""
    unknown = [x for x in loads(query) if x.has(QUERY)]
    if not unknown:
        return
    if any(sympy.expand(query.subs(QUERY, KEY - o) + key) == 0 for o in lengths.offsets):
        return
    name = name_of(unknown[0])
    raise NotByKey(f"whole queries are masked or shifted by '{name}'; mask the keys instead")


def _unknown_keys(term: Expr, reader: Reader) -> bool:
    return any(x.has(KEY) and not _of_module(x, reader) for x in loads(term))


def _of_module(load: Expr, reader: Reader) -> bool:
    """Whether a value is a parameter or a buffer."""
    known = input_name(_origin(reader.leaf(load), reader))
    return known is not None and known[0]


def _given(load: Expr, reader: Reader) -> bool:
    """Whether a value is what the user passes in, and no parameter or buffer."""
    node = _origin(reader.leaf(load), reader)
    return node.op == "placeholder" and not _of_module(load, reader)


def _origin(node: fx.Node, reader: Reader) -> fx.Node:
    """The tensor that views and casts were made of, outside the nested body."""
    while True:
        outside = reader.outer(node) if node.op == "placeholder" else None
        if outside is not None:
            node = outside
        elif node.target in VIEWS | CASTS and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node


def _far_above(value: Expr) -> Expr:
    """value > MASKED_BELOW, as a bound on the one unknown where the value is linear in it."""
    unknown = loads(value)
    if len(unknown) == 1 and value.is_polynomial(unknown[0]):
        slope, rest = value.coeff(unknown[0]), value.subs(unknown[0], 0)
        if slope.is_number and rest.is_number and sympy.expand(value - slope * unknown[0]) == rest:
            bound = (sympy.Integer(int(MASKED_BELOW)) - rest) / slope
            if unknown[0].is_integer:
                above = sympy.Ge(unknown[0], sympy.floor(bound) + 1)
                return above if slope > 0 else sympy.Le(unknown[0], sympy.ceiling(bound) - 1)
            return sympy.Gt(unknown[0], bound) if slope > 0 else sympy.Lt(unknown[0], bound)
    return sympy.Gt(value, MASKED_BELOW)


def _from_last_key(key: Expr, lengths: Lengths) -> Expr:
    """slope * j as slope * (j - (Nk - 1)): small where the softmax looks, and so precise."""
    slope = key.coeff(KEY, 1)
    if slope == 0 or slope.has(KEY):
        return key
    distance = KEY - (lengths.keys[0] - 1)
    return sympy.expand(key - slope * KEY) + sympy.Mul(slope, distance, evaluate=False)
