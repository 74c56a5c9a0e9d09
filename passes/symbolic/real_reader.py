"""Reads floating tensors as real numbers: what a bias adds to the scores, up to rounding.

    exact       slopes[h] * (j - i) in bfloat16 is an unknown: not every value of it is what it says
    real        slope(h) * (j - i)

Truth values and integers are read exactly, so that a mask inside a bias is still proved. What does
not depend on the query is small, and stays the graph's own node: a rewrite can use it as it is.

Nothing trained is read past the place where its gradient ends: slopes.detach() is not slopes.
"""

from collections.abc import Callable

import sympy
from torch import fx

from moonfx.passes.graph.nodes import dtype
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.symbolic.expressions import Expr, Index, head_symbols, loads, stored, to_number
from moonfx.passes.symbolic.indices import KEY, QUERY
from moonfx.passes.symbolic.reader import Reader
from moonfx.passes.symbolic.rules import RULES, VIEWS


class RealReader(Reader):
    """A reader of the same leaves as `exact`, by the same names.

    Args:
        ends: whether a node, and no gradient of it, comes from something trained.
    """

    def __init__(self, exact: Reader, ends: Callable[[fx.Node], bool]) -> None:
        self.exact, self.ends = exact, ends
        self.outer, self.name, self.mutated = exact.outer, exact.name, exact.mutated
        self.leaves, self.constants, self.tensors = exact.leaves, exact.constants, exact.tensors
        self._names = exact._names
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._memo_before: dict[tuple[fx.Node, Index, int], Expr] = {}

    def read_before(self, node: object, index: Index, place: int) -> Expr:
        kind = dtype(node) if isinstance(node, fx.Node) else None
        if kind is None or not kind.is_floating_point:
            return self.exact.read_before(node, index, place)
        return super().read_before(node, index, place)

    def _read(self, node: fx.Node, index: Index) -> Expr:
        kind = dtype(node)
        if kind is None or not kind.is_floating_point:
            return self.exact.read(node, index)
        if self.mutated(node):
            return self._as_users_see(node, index)
        if node.op == "placeholder" and (source := self.outer(node)) is not None:
            return self.read(source, index)
        if node.op != "call_function":
            return self.exact.read(node, index)
        return self.value(node, index)

    def value(self, node: fx.Node, index: Index, place: int | None = None) -> Expr:
        if self.ends(node):
            return self.load(node, index)
        if not any(x.has(QUERY) for x in index):
            return self._small(node, index, place)
        seen = self.seen_by(node, place)
        if node.target in CASTS:
            return to_number(seen.read(node.args[0], index))
        rule = RULES.get(node.target)
        result = rule(seen, node, index) if rule is not None else None
        if result is None:
            return self.load(node, index)
        exact = stored(result, dtype(node))
        if exact is not None:
            return exact
        result = to_number(result)
        finite = not result.has(sympy.nan, sympy.oo, -sympy.oo, sympy.zoo)
        return result if finite else self.load(node, index)

    def _small(self, node: fx.Node, index: Index, place: int | None) -> Expr:
        """A value that is the same for every query: what it is where it may be a mask, or a leaf.

        Of a tensor broadcast over heads the one that is not.
        """
        exact = self.exact
        value = exact.read(node, index) if place is None else exact.value(node, index, place)
        known = value.is_number or isinstance(value, sympy.Piecewise)
        if known and not _unknown_numbers(value):
            return value
        seen = self.seen_by(node, place)
        if node.target in VIEWS and (source := RULES[node.target](seen, node, index)) is not None:
            source = to_number(source)
            if all(_at_known_places(x) for x in loads(source)):
                return source
        if node.target in CASTS:
            source = to_number(seen.read(node.args[0], index))
            heads = [x for x in loads(source) if x.free_symbols & head_symbols()]
            if not heads and any(x.free_symbols & head_symbols() for x in index):
                return source
        return self.load(node, index)


def _at_known_places(load: Expr) -> bool:
    """Whether keys are read from a place that is a number: load(.., j + 2), not load(.., j + n)."""
    return all(sympy.expand(x - KEY).is_Integer for x in load.args if x.has(KEY))


def _unknown_numbers(value: Expr) -> bool:
    """Whether a choice is between values of which one is not a constant."""
    if isinstance(value, sympy.Piecewise):
        return any(_unknown_numbers(branch) for branch, _ in value.args)
    return bool(loads(value)) or not value.is_number
