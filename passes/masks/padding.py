"""Conditions on values that the graph does not know: key padding, or why a mask is not that.

real[b, j] != 0                 padding: which keys of a row are real
j < length[b]                   the same, by lengths
real[b, i] != 0                 whole queries are masked
real[b, i] <= real[b, j]        compared, by values unknown
"""

import sympy

from moonfx.passes.symbolic.expressions import Expr, describe, loads, name_of
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY


def of_values(atom: Expr) -> str:
    """Why a condition with unknown values is not key padding; "" if it is."""
    unknown = loads(atom)
    names = ", ".join(sorted({name_of(x) for x in unknown}))
    by_query = any(x.has(QUERY) for x in unknown)
    by_key = any(x.has(KEY) for x in unknown)
    if any(x.has(HEAD, sympy.Mod) for x in unknown) or atom.has(HEAD):
        return f"the mask '{names}' differs by head; one mask for all heads can be proved"
    if any(x.has(QUERY) and x.has(KEY) for x in unknown):
        return (
            f"the values of the mask '{names}' are not known; a 2-D mask of the keys, or segment "
            "ids, can be proved"
        )
    if by_query and by_key:
        return _compared(atom, names)
    if by_query:
        return f"whole queries are masked by '{names}'; mask the keys of padding instead"
    outside = atom.subs({x: sympy.Dummy(integer=True) for x in unknown})
    if atom.has(QUERY):
        if by_key:
            return f"the mask mixes query positions with '{names}'"
        if not outside.has(KEY):
            return f"whole queries are masked by '{names}'; mask the keys of padding instead"
        return (
            f"the mask compares positions with values read from '{names}' (a static cache? a "
            "DynamicCache can be proved)"
        )
    if not all(_is_row_and_key(x) for x in unknown):
        return f"the padding mask '{names}' is not read at (row, key)"
    if not (by_key or outside.has(KEY)):
        return f"whole rows of the batch are masked by '{names}'"
    if outside.has(BATCH):
        return f"the padding mask '{names}' also depends on rows: {describe(atom)}"
    return ""


def _compared(atom: Expr, names: str) -> str:
    if isinstance(atom, sympy.Eq):
        return (
            f"packed sequences: queries and keys are compared by '{names}', which is not proved to "
            "be read at the same token for both"
        )
    return (
        f"packed sequences: queries and keys are compared by '{names}'; compare segment ids for "
        "equality, or pass attention_mask to prove that it is one sequence"
    )


def _is_row_and_key(load: Expr) -> bool:
    """load(b, j + c), load(b // H, j), load(0, j), load(b, 0, 0, j), load(j), load(b)."""
    rows = [x for x in load.args if not x.has(KEY)]
    keys = [sympy.expand(x - KEY) for x in load.args if x.has(KEY)]
    batches = [r for r in rows if not r.is_Integer]
    known = len(batches) <= 1 and all(r == BATCH or heads_of(r) for r in batches)
    last = not keys or load.args[-1].has(KEY)
    return known and last and len(keys) <= 1 and all(map(_is_shift, keys))


def _is_shift(shift: Expr) -> bool:
    return shift.is_nonnegative is True and not shift.has(BATCH, HEAD, QUERY, KEY)


def heads_of(row: Expr) -> int | None:
    """H of a row index b // H, else None."""
    if not isinstance(row, sympy.floor):
        return None
    share = row.args[0].coeff(BATCH)
    whole = share != 0 and sympy.expand(row.args[0] - share * BATCH) == 0 and (1 / share).is_Integer
    return int(1 / share) if whole else None
