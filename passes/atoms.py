"""The conditions that a mask is made of: causal, padding, windows, ..., each with a name.

A condition is a sympy relation over the indices of `symbols.py` and the unknown values of tensors.
One that the rewrite does not support has the reason for declining as its name.
"""

import sympy

from moonfx.passes.expressions import Expr, describe, loads, name_of
from moonfx.passes.symbols import BATCH, HEAD, KEY, QUERY, Lengths

WINDOW = "sliding window"
ANTI_CAUSAL = "anti-causal: a query sees keys behind it, and those before it are hidden"


def classify_atom(atom: Expr, lengths: Lengths) -> str:
    """ "causal", "padding", "always", or else the reason for declining."""
    if atom == True:  # noqa: E712
        return "always"
    if atom == False:  # noqa: E712
        return "the mask hides every key"
    unknown = loads(atom)
    names = ", ".join(sorted({name_of(x) for x in unknown}))
    if unknown:
        by_query = any(x.has(QUERY) for x in unknown)
        by_key = any(x.has(KEY) for x in unknown)
        if any(x.has(HEAD, sympy.Mod) for x in unknown) or atom.has(HEAD):
            return f"the mask '{names}' differs by head"
        if any(x.has(QUERY) and x.has(KEY) for x in unknown):
            return f"the values of the mask '{names}' are not known"
        if by_query and by_key:
            if "floor_divide" in names:
                return f"chunked attention: queries and keys are compared by '{names}'"
            return (
                f"packed sequences: queries and keys are compared by '{names}'; "
                "pass attention_mask to prove that it is one sequence"
            )
        if by_query:
            return f"whole queries are masked by '{names}'"
        if not by_key:
            return f"the mask compares positions with values read from '{names}' (a static cache?)"
        if atom.has(QUERY):
            return f"the mask mixes query positions with '{names}'"
        if not all(_is_row_and_key(x) for x in unknown):
            return f"the padding mask '{names}' is not read at (row, key)"
        if atom.subs({x: sympy.Dummy(integer=True) for x in unknown}).has(KEY, BATCH):
            return f"the padding mask '{names}' also depends on positions: {describe(atom)}"
        return "padding"
    if isinstance(atom, sympy.Or):
        return _always_or(atom, lengths)
    bound = _at_most_zero(atom)
    if bound is None:
        return f"unsupported mask condition {describe(atom)}"
    by_key, by_query = bound.coeff(KEY), bound.coeff(QUERY)
    rest = sympy.expand(bound - by_key * KEY - by_query * QUERY)
    if rest.has(KEY, QUERY, HEAD, BATCH):
        return f"unsupported mask condition {describe(atom)}"
    if _never_positive(bound, lengths):
        return "always"
    if (by_key, by_query) == (1, -1):
        known = lengths.offsets
        if sympy.expand(-rest) in known:
            return "causal"
        return f"causal with offset {-rest}, where the last query sees the last key at {known[0]}"
    if (by_key, by_query) == (-1, 1):
        return f"{WINDOW} of {sympy.expand(1 + lengths.offsets[0] - rest)} tokens"
    # torch's own Max, of the first token that the cache still holds
    if not by_query and any(type(x).__name__ == "Max" for x in sympy.preorder_traversal(rest)):
        return f"{WINDOW}, of a cache that holds no more than it: {describe(atom)}"
    if (by_key, by_query) == (-1, 0) and lengths.one_query:
        return f"{WINDOW} of {sympy.expand(lengths.keys[0] - rest)} tokens"
    return f"unsupported mask condition {describe(atom)}"


def _always_or(atom: Expr, lengths: Lengths) -> str:
    if any(classify_atom(part, lengths) == "always" for part in atom.args):
        return "always"
    possible = [p for p in atom.args if classify_atom(sympy.Not(p), lengths) != "always"]
    if len(possible) == 1 and classify_atom(possible[0], lengths) == "causal":
        return "causal"
    return f"a choice between masks: {describe(atom)}"


def _is_row_and_key(load: Expr) -> bool:
    """load(b, j + c), load(b // H, j + c), load(0, j + c) or load(j + c)."""
    *rows, key = load.args
    shift = sympy.expand(key - KEY)
    known = len(rows) <= 1 and all(r == BATCH or r.is_Integer or heads_of(r) for r in rows)
    return known and shift.is_nonnegative is True and not shift.has(BATCH, HEAD, QUERY, KEY)


def heads_of(row: Expr) -> int | None:
    """H of a row index b // H, else None."""
    if not isinstance(row, sympy.floor):
        return None
    share = row.args[0].coeff(BATCH)
    whole = share != 0 and sympy.expand(row.args[0] - share * BATCH) == 0 and (1 / share).is_Integer
    return int(1 / share) if whole else None


def _at_most_zero(atom: Expr) -> Expr | None:
    """An integer relation as an expression e with e <= 0, or None."""
    if isinstance(atom, sympy.Le):
        return sympy.expand(atom.lhs - atom.rhs)
    if isinstance(atom, sympy.Lt):
        return sympy.expand(atom.lhs - atom.rhs + 1)
    if isinstance(atom, sympy.Ge):
        return sympy.expand(atom.rhs - atom.lhs)
    if isinstance(atom, sympy.Gt):
        return sympy.expand(atom.rhs - atom.lhs + 1)
    return None


def _never_positive(bound: Expr, lengths: Lengths) -> bool:
    """Whether a linear bound is <= 0 at every index of the mask."""
    by_query, by_key = bound.coeff(QUERY), bound.coeff(KEY)
    if not (by_query.is_number and by_key.is_number):
        return False
    rest = bound - by_query * QUERY - by_key * KEY
    for queries in lengths.queries:
        for keys in lengths.keys:
            largest = rest + sympy.Max(0, by_query) * (queries - 1)
            largest = sympy.expand(largest + sympy.Max(0, by_key) * (keys - 1))
            if largest.is_nonpositive is True:
                return True
    return False
