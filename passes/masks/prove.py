"""Brings what was read of a site's masks to one conjunction, and says what that is.

    before  values of the masks at (batch, head, query, key), and how each acts on the scores
    after   causal or not, the padding, the packed sequences and the bias, or why they are declined

Nothing here looks at a graph node but to name it, so that equal masks of many layers are proved
once.
"""

from dataclasses import dataclass, replace

import sympy

from moonfx.passes.masks import absorb, key_bias, packing
from moonfx.passes.masks.additive import Added, NotAMask, split
from moonfx.passes.masks.conditions import (
    ALWAYS,
    CAUSAL,
    PADDING,
    SHIFTED,
    SUPPORTED,
    WINDOW,
    Atom,
    classify_atom,
)
from moonfx.passes.masks.key_bias import Bias, NotByKey
from moonfx.passes.symbolic.expressions import Expr, to_bool, to_number
from moonfx.passes.symbolic.indices import KEY, QUERY, Lengths
from moonfx.passes.symbolic.reader import Reader

ANTI_CAUSAL = "anti-causal: a query sees later keys, and earlier ones are hidden"


@dataclass(frozen=True)
class ReadMask:
    """One mask as it was read.

    Args:
        value: exact, for a "keep" or "drop" mask; up to rounding for an "additive" one.
        how: as in AttentionSite.masks.
        scale: what the sum of scores and mask is multiplied by.
    """

    value: Expr
    how: str
    scale: float = 1.0


@dataclass(frozen=True)
class Proof:
    """What masks are together.

    Args:
        causal: whether they hide exactly the later keys of each query, packing and padding apart.
        reason: why they are not supported, "" if they are.
        at: which mask stands in the way.
        window: the size of a sliding window in the way, in tokens.
    """

    causal: bool = False
    padding: Expr | None = None
    segments: Expr | None = None
    bias: Bias | None = None
    reason: str = ""
    at: int = 0
    window: Expr | None = None


def prove(
    given: tuple[ReadMask, ...],
    lengths: Lengths,
    reader: Reader,
    *,
    is_causal: bool,
    sees_constants: bool,
) -> Proof:
    """What the masks of one attention are.

    Args:
        is_causal: the operator itself was told to be causal, with as many keys as queries.
        sees_constants: whether a constant added to all scores of a query would be seen.
    """
    try:
        hidden, added = _together(given, lengths, is_causal=is_causal)
        segments, rest = _packing(hidden, lengths, reader)
        bias, real = _bias(added, rest, lengths, reader, sees_constants=sees_constants)
    except _NotProved as found:
        return Proof(reason=found.reason, at=found.at)
    proof = _support(_conjunction([*rest, *real], lengths) if real else rest, lengths)
    return replace(proof, segments=segments, bias=bias)


class _NotProved(Exception):
    """Masks that are not supported: why, and which of them stands in the way."""

    def __init__(self, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.at = reason, at


def _together(
    given: tuple[ReadMask, ...], lengths: Lengths, *, is_causal: bool
) -> tuple[list[Expr], list[tuple[int, Added]]]:
    """The conditions under which a query sees a key, and what is added to the scores."""
    conditions: list[Expr] = [sympy.Le(KEY, QUERY)] if is_causal else []
    times: list[tuple[int, Expr]] = []
    added: list[tuple[int, Added]] = []
    for at, mask in enumerate(given):
        if mask.how == "additive":
            value = mask.value if mask.scale == 1.0 else mask.value * sympy.Float(mask.scale)
            try:
                added.append((at, split(value)))
            except NotAMask as found:
                raise _NotProved(f"additive bias: {found}", at) from None
            conditions.append(added[-1][1].keep)
        elif mask.how == "times":
            if (keep := _where_one(mask.value)) is None:
                raise _NotProved("the scores are scaled by a tensor", at)
            times.append((at, keep))
        else:
            keep = to_bool(mask.value)
            conditions.append(sympy.Not(keep) if mask.how == "drop" else keep)
    hidden = _conjunction(conditions, lengths)
    for at, keep in times:
        if not set(_conjunction([keep], lengths)) <= set(hidden):
            shown = "the scores are multiplied by a mask, which makes them 0 and does not hide them"
            raise _NotProved(shown, at)
    return hidden, added


def _bias(
    added: list[tuple[int, Added]],
    conditions: list[Expr],
    lengths: Lengths,
    reader: Reader,
    *,
    sees_constants: bool,
) -> tuple[Bias | None, list[Expr]]:
    """The bias of all that is added, and the conditions under which a key is real because of it."""
    total = Added(
        sympy.true,
        sympy.Add(*(a.bias for _, a in added)),
        sympy.Max(*(a.weakest for _, a in added)),
    )
    if total.bias == 0:
        return None, []
    causal = any(classify_atom(atom, lengths).kind == CAUSAL for atom in conditions)
    try:
        return key_bias.by_key(total, lengths, reader, causal=causal, sink=sees_constants)
    except NotByKey as found:
        raise _NotProved(f"additive bias: {found}", added[0][0]) from None


def _conjunction(conditions: list[Expr], lengths: Lengths) -> list[Expr]:
    return absorb.conjunction(
        conditions, lambda relation: classify_atom(relation, lengths).kind == ALWAYS
    )


def _where_one(value: Expr) -> Expr | None:
    """The condition under which a mask of 0 and 1 is 1; None if it may hold anything else."""
    value = to_number(value)
    if value.is_number:
        return {0: sympy.false, 1: sympy.true}.get(value)
    if not isinstance(value, sympy.Piecewise) or {x for x, _ in value.args} != {0, 1}:
        return None
    return to_bool(value)


def _packing(atoms: list[Expr], lengths: Lengths, reader: Reader) -> tuple[Expr | None, list[Expr]]:
    """The segment ids among the conditions, and the other conditions, inside of a segment."""
    found = [packing.segments_of(atom, lengths) for atom in atoms]
    segments = list(dict.fromkeys(s for s in found if s is not None))
    rest = [a for a, s in zip(atoms, found, strict=True) if s is None]
    if len(segments) > 1:
        raise _NotProved(f"packed sequences, told apart by {len(segments)} tensors at once")
    if not segments:
        return None, rest
    (ids,) = segments
    inside = [packing.within(a, ids, lengths, reader) for a in rest]
    return ids, _conjunction(inside, lengths)


def _support(atoms: list[Expr], lengths: Lengths) -> Proof:
    kinds = [classify_atom(atom, lengths) for atom in atoms]
    ordered = any(a.kind in (CAUSAL, SHIFTED) for a in kinds)
    for atom in kinds:
        if atom.kind not in SUPPORTED:
            reason = _reason(atom, ordered or lengths.one_query)
            return Proof(reason=reason, window=atom.size if reason == atom.reason else None)
    padding = [a for a, kind in zip(atoms, kinds, strict=True) if kind.kind == PADDING]
    causal = any(a.kind == CAUSAL for a in kinds)
    return Proof(causal, sympy.And(*padding) if padding else None)


def _reason(atom: Atom, ordered: bool) -> str:
    both_ways = atom.reason.endswith("side")
    return atom.reason if ordered or atom.kind != WINDOW or both_ways else ANTI_CAUSAL
