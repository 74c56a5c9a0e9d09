"""Brings conditions to a conjunction without redundant parts.

    before  ~(A & B) & ~(A | B)        what two planes of a finite minimum hide when they are added
    after   ~A & ~B

    before  (A & B) | (A & C)
    after   A & (B | C)

Every part counts as one that holds or does not whatever the others do, so that the result says the
same at every index. A relation and its negation are one part: j <= i and j > i.
"""

import functools
from collections.abc import Callable, Iterator

import sympy
from sympy.core.relational import Relational

from moonfx.passes.symbolic.expressions import Expr

# Conditions of more parts stay as they are: a table of truth has 2 to their number of rows.
_MOST_PARTS = 12


def conjunction(conditions: list[Expr], always: Callable[[Expr], bool]) -> list[Expr]:
    """What holds where all the conditions do, in few parts.

    Args:
        always: whether a relation holds at every index.
    """
    whole = sympy.to_nnf(sympy.And(*conditions), simplify=False)
    parts = list(sympy.And.make_args(whole))
    if not any(isinstance(part, sympy.Or) for part in parts):
        return parts
    whole = _mapped(whole, lambda part: _decided(part, always))
    table = _Table(whole)
    if not 0 < len(table.parts) <= _MOST_PARTS:
        return list(sympy.And.make_args(whole))
    rows = table.rows(whole)
    if rows == 0:
        return [sympy.false]
    implied = [x for part in table.parts for x in (part, sympy.Not(part)) if table.all(rows, x)]
    for literal in implied:
        whole = _mapped(whole, functools.partial(table.given, known=literal))
    clauses = [_shorter(c, implied, table) for c in sympy.And.make_args(whole)]
    for clause in list(clauses):
        others = [c for c in clauses if c is not clause]
        if table.rows(sympy.And(*implied, *others)) == rows:
            clauses = others
    return [*implied, *clauses]


def is_impossible(condition: Expr) -> bool:
    """Whether a condition holds nowhere, by its form alone: j <= i and j > i."""
    table = _Table(condition)
    return len(table.parts) <= _MOST_PARTS and table.rows(condition) == 0


def _shorter(clause: Expr, implied: list[Expr], table: "_Table") -> Expr:
    """A choice without what the rest of it says already, beside conditions that hold."""
    rows = table.rows(sympy.And(*implied, clause))
    while isinstance(clause, sympy.Or):
        fewer = (c for c in _fewer(clause) if table.rows(sympy.And(*implied, c)) == rows)
        if (shorter := next(fewer, None)) is None:
            break
        clause = shorter
    return clause


def _fewer(choice: sympy.Or) -> Iterator[Expr]:
    """A choice with one part less, of those that it is between or of one of them."""
    for left in choice.args:
        others = [part for part in choice.args if part is not left]
        yield sympy.Or(*others)
        if isinstance(left, sympy.And):
            for part in left.args:
                yield sympy.Or(*others, sympy.And(*(p for p in left.args if p is not part)))


def _mapped(condition: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """A condition with each of its relations changed."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
        return condition.func(*(_mapped(part, change) for part in condition.args))
    return change(condition)


def _decided(relation: Expr, always: Callable[[Expr], bool]) -> Expr:
    if always(relation):
        return sympy.true
    return sympy.false if always(sympy.Not(relation)) else relation


class _Table:
    """A table of truth over the parts of a condition; a set of its rows is the bits of a number."""

    def __init__(self, condition: Expr) -> None:
        self.parts: list[Expr] = []
        self._at: dict[Expr, int] = {}
        self._find(condition)
        self.whole = (1 << (1 << len(self.parts))) - 1

    def rows(self, condition: Expr) -> int:
        """The rows in which a condition holds."""
        if isinstance(condition, sympy.Not):
            return self.whole & ~self.rows(condition.args[0])
        if isinstance(condition, sympy.And | sympy.Or):
            (result, *others) = (self.rows(part) for part in condition.args)
            for rows in others:
                result = result & rows if isinstance(condition, sympy.And) else result | rows
            return result
        if condition in (True, False):
            return self.whole if condition else 0
        key, holds = _key(condition)
        rows = self._column(self._at[key])
        return rows if holds else self.whole & ~rows

    def all(self, rows: int, condition: Expr) -> bool:
        """Whether a condition holds in all of some rows."""
        return rows & ~self.rows(condition) == 0

    def given(self, part: Expr, known: Expr) -> Expr:
        """A part, if one that is known to hold decides it."""
        if part in (True, False):
            return part
        (key, holds), (of, wanted) = _key(part), _key(known)
        return part if key != of else sympy.true if holds == wanted else sympy.false

    def _find(self, condition: Expr) -> None:
        if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
            for part in condition.args:
                self._find(part)
        elif condition not in (True, False) and (key := _key(condition)[0]) not in self._at:
            self._at[key] = len(self.parts)
            self.parts.append(condition)

    def _column(self, at: int) -> int:
        """The rows in which part `at` holds: 2 ** at without it, as many with it, and again."""
        run = ((1 << (1 << at)) - 1) << (1 << at)
        for bit in range(at + 1, len(self.parts)):
            run |= run << (1 << bit)
        return run


def _key(part: Expr) -> tuple[Expr, bool]:
    """A part by a name that its spellings share, and whether it holds where the named one does."""
    if isinstance(part, sympy.Not):
        key, holds = _key(part.args[0])
        return key, not holds
    if not isinstance(part, Relational):
        return part, True
    bound = sympy.expand(part.lhs - part.rhs)
    if isinstance(part, sympy.Eq | sympy.Ne):
        turned = bound.could_extract_minus_sign()
        return sympy.Eq(-bound if turned else bound, 0, evaluate=False), isinstance(part, sympy.Eq)
    strict = isinstance(part, sympy.Lt | sympy.Gt)
    if isinstance(part, sympy.Ge | sympy.Gt):
        bound = -bound
    if bound.is_integer and strict:
        bound, strict = bound + 1, False
    if not bound.as_coeff_Add()[1].could_extract_minus_sign():
        return (sympy.Lt if strict else sympy.Le)(bound, 0, evaluate=False), True
    if bound.is_integer:
        return sympy.Le(1 - bound, 0, evaluate=False), False
    return (sympy.Le if strict else sympy.Lt)(-bound, 0, evaluate=False), False
