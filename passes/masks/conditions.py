"""The conditions that a mask is made of, each with a name, and what is done about each.

    before  j <= i + (Nk - Nq), real[b, j] != 0, j > i - 512
    after   causal, padding, "sliding window of 512 tokens"

A condition is a sympy relation over indices (symbolic/indices.py) and unknown values of tensors.
CAUSAL, PADDING and ALWAYS are supported; every other atom says why it is not, and what to change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sympy

from moonfx.passes.masks.padding import of_values
from moonfx.passes.symbolic.expressions import Expr, describe, loads
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY, Lengths

CAUSAL, PADDING, ALWAYS, WINDOW, SHIFTED, OTHER = (
    *("causal", "padding", "always", "window", "causal with another offset", "other"),
)
SUPPORTED = (CAUSAL, PADDING, ALWAYS)


@dataclass(frozen=True)
class Atom:
    """What a condition is.

    Args:
        kind: one of the names above.
        reason: why attention with it is declined, "" for a supported one.
        size: of a window, in tokens.
    """

    kind: str
    reason: str = ""
    size: Expr | None = None


def classify_atom(atom: Expr, lengths: Lengths) -> Atom:
    """What one condition of a conjunction is."""
    for recognise in _RECOGNISERS:
        found = recognise(atom, lengths)
        if found is not None:
            return found
    proved = "causal, padding and equal segment ids can be proved"
    return Atom(OTHER, f"unsupported mask condition {describe(atom)}; {proved}")


def _constant(atom: Expr, lengths: Lengths) -> Atom | None:
    if atom == True:  # noqa: E712
        return Atom(ALWAYS)
    if atom == False:  # noqa: E712
        return Atom(OTHER, "the mask hides every key")
    return None


def _choice(atom: Expr, lengths: Lengths) -> Atom | None:
    """p or q: one that always holds, or one beside others that never do; else a named union."""
    if not isinstance(atom, sympy.Or):
        return None
    parts = [classify_atom(part, lengths) for part in atom.args]
    if any(part.kind == ALWAYS for part in parts):
        return Atom(ALWAYS)
    negated = [classify_atom(sympy.Not(part), lengths) for part in atom.args]
    possible = [p for p, n in zip(atom.args, negated, strict=True) if n.kind != ALWAYS]
    if len(possible) < len(parts):
        return classify_atom(sympy.Or(*possible), lengths)
    return _beside_causal(atom, parts)


def _beside_causal(atom: sympy.Or, parts: list[Atom]) -> Atom | None:
    """j <= i or something that lets a query see some later keys."""
    others = [a for a, part in zip(atom.args, parts, strict=True) if part.kind != CAUSAL]
    if len(others) == len(parts) or atom.has(HEAD):
        return None
    union = sympy.Or(*others)
    names = ", ".join(sorted({str(x.func).removeprefix("load_") for x in loads(union)}))
    by = f" (by '{names}')" if names else ""
    if not union.has(QUERY):
        return Atom(
            OTHER,
            f"prefix-LM: the keys of a prefix{by} are seen by the queries before them; only causal "
            "and, with causal_only=False, bidirectional attention can be sparse",
        )
    choice = f"a choice between masks: causal, or {describe(union)}"
    images = (
        f": tokens of a group{by} see each other in both directions, as images in a prompt do "
        "(leave token_type_ids out for text)"
    )
    return Atom(OTHER, choice + images if names else choice)


def _of_values(atom: Expr, lengths: Lengths) -> Atom | None:
    """A condition on values that the graph does not know."""
    if not loads(atom):
        return None
    reason = of_values(atom)
    return Atom(OTHER, reason) if reason else Atom(PADDING)


def _chunk(atom: Expr, lengths: Lengths) -> Atom | None:
    """i // c == j // c."""
    if not isinstance(atom, sympy.Eq | sympy.Ne) or not atom.has(sympy.floor):
        return None
    if not (atom.has(QUERY) and atom.has(KEY)):
        return None
    sizes = {1 / f.args[0].coeff(KEY) for f in atom.atoms(sympy.floor) if f.has(KEY)}
    size = f" of {sizes.pop()} tokens" if len(sizes) == 1 else ""
    return Atom(
        OTHER,
        f"chunked attention{size}: queries and keys are compared by chunk, and a chunk is short "
        "already; layers of full attention beside it can be sparse",
    )


def _linear(atom: Expr, lengths: Lengths) -> Atom | None:
    """a * j + c * i <= constant."""
    bound = at_most_zero(atom)
    if bound is None:
        return None
    by_key, by_query = bound.coeff(KEY), bound.coeff(QUERY)
    rest = sympy.expand(bound - by_key * KEY - by_query * QUERY)
    if rest.has(KEY, QUERY, HEAD, BATCH):
        return _window_both_ways(bound)
    if never_positive(bound, lengths):
        return Atom(ALWAYS)
    first, keys = lengths.offsets[0], lengths.keys[0]
    if (by_key, by_query) == (1, -1):
        if sympy.expand(-rest) in lengths.offsets:
            return Atom(CAUSAL)
        where = f"causal with offset {-rest}, where the last query sees the last key at {first}"
        advice = "the keys must end with the query's own token (no is_causal with a longer cache)"
        return Atom(SHIFTED, f"{where}; {advice}")
    if (by_key, by_query) == (-1, 1):
        return _window(sympy.expand(1 + first - rest))
    # torch's own Max, of the first token that the cache still holds
    if not by_query and any(type(x).__name__ == "Max" for x in sympy.preorder_traversal(rest)):
        return Atom(
            WINDOW, f"sliding window, of a cache that holds no more than it: {describe(atom)}"
        )
    if (by_key, by_query) == (-1, 0) and lengths.one_query:
        return _window(sympy.expand(keys - rest))
    return None


def _window(size: Expr) -> Atom:
    return Atom(WINDOW, f"sliding window of {size} tokens", size)


def _window_both_ways(bound: Expr) -> Atom | None:
    """|i - j| <= w."""
    (distance, *others) = bound.atoms(sympy.Abs) or (None,)
    if distance is None or others or not distance.has(QUERY) or not distance.has(KEY):
        return None
    width = sympy.expand(distance - bound)
    if width.has(QUERY, KEY) or not width.is_number:
        return None
    size = 2 * width + 1
    return Atom(WINDOW, f"sliding window of {size} tokens, {width} to either side", size)


_RECOGNISERS: tuple[Callable[[Expr, Lengths], Atom | None], ...] = (
    *(_constant, _choice, _chunk, _of_values, _linear),
)


def at_most_zero(atom: Expr) -> Expr | None:
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


def never_positive(bound: Expr, lengths: Lengths) -> bool:
    """Whether a linear bound is <= 0 at every index of the mask, however long the call is.

    i - j < 128 holds everywhere in a call of 60 tokens, and is a window all the same: where a
    length is a number, the bound must be reached at the last index, as j <= Nk - 1 is.
    """
    by_query, by_key = bound.coeff(QUERY), bound.coeff(KEY)
    if not (by_query.is_number and by_key.is_number):
        return False
    rest = bound - by_query * QUERY - by_key * KEY
    for queries in lengths.queries:
        for keys in lengths.keys:
            grows = (by_query > 0 and not lengths.one_query and queries.is_number) or (
                by_key > 0 and keys.is_number
            )
            largest = rest + sympy.Max(0, by_query) * (queries - 1)
            largest = sympy.expand(largest + sympy.Max(0, by_key) * (keys - 1))
            if largest == 0 or (largest.is_nonpositive is True and not grows):
                return True
    return False
