"""Proves what a mask is, for every shape.

    before  mask [B, 1, Nq, Nk] from 20 to 35 nodes of arange, le, index, expand, where, ...
    after   site.mask = "causal" or "causal & padding", or site.reject with the part in the way

The mask is read at symbolic indices (batch b, head h, query i, key j) and brought to a conjunction
of conditions. Each condition must be one that the rewrite supports: causal with the offset
Nk - Nq (the last query sees the last key), key padding, or true for every index.
"""

from typing import Any

import sympy
import torch
from torch import fx

from moonfx.capture import expression, same_size
from moonfx.passes.context import Context
from moonfx.passes.expressions import (
    MASKED_BELOW,
    Expr,
    describe,
    head_symbol,
    loads,
    name_of,
    to_bool,
    to_number,
)
from moonfx.site import AttentionSite, Mask, Reject

aten = torch.ops.aten
_LOOK_THROUGH = {
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.alias.default,
}

BATCH, HEAD, QUERY, KEY = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j")
)


WINDOW = "sliding window"
ANTI_CAUSAL = "anti-causal: a query sees keys behind it, and those before it are hidden"


class NotAMask(Exception):
    """A value that is neither kept (0) nor masked (hugely negative)."""


def run(graph: fx.Graph, context: Context) -> int:
    """Classifies the mask of each site found in the graph; returns how many are supported."""
    supported = 0
    for site in context.sites:
        if site.output.graph is not graph or site.reject is not None:
            continue
        result = classify(site, context)
        if isinstance(result, Reject):
            context.decline(site, result)
        else:
            site.mask, supported = result, supported + 1
    return supported


def classify(site: AttentionSite, context: Context) -> Mask | Reject:
    query_length = site.query.meta["val"].shape[-2]
    if site.causal and sympy.Integer(0) not in offsets(site):
        return Reject(
            "is_causal aligns the first query with the first key, and the key length "
            f"({lengths(site, KEY)[0]}) is not proved equal to the query length ({query_length})",
            site.output,
        )
    if not site.masks and not site.causal:
        return _without_mask(site, query_length, context)

    conditions: list[Expr] = [sympy.Le(KEY, QUERY)] if site.causal else []
    for node, how in site.masks:
        index = mask_index(site, len(node.meta["val"].shape))
        if index is None:
            return Reject(f"the mask has {len(node.meta['val'].shape)} dimensions", node)
        value = context.reader.broadcast(node, index).subs(head_symbol(site.heads or 1), HEAD)
        written = [x for x in loads(value) if context.mutated(context.reader.leaf(x))]
        if written:
            name = name_of(written[0])
            if not written[0].has(QUERY, KEY):
                return Reject(
                    f"the mask compares positions with '{name}', which is written to in place "
                    "(a static cache?)",
                    node,
                )
            return Reject(f"the mask is written to in place ('{name}')", node)
        try:
            keep = kept(value) if how == "additive" else to_bool(value)
        except NotAMask as found:
            what = "additive bias (ALiBi, relative positions or learned) that is not a mask"
            return Reject(f"{what}: {found}", node)
        conditions.append(sympy.Not(keep) if how == "drop" else keep)
    atoms = sympy.And.make_args(sympy.to_nnf(sympy.And(*conditions), simplify=False))
    return _support(atoms, site)


def lengths(site: AttentionSite, axis: sympy.Symbol) -> list[Expr]:
    """The number of queries or keys, by every symbol it goes by.

    Dense attention needs the keys, the values and the mask to agree, so that a proof may use the
    size of any of them; each tensor of a KV cache has a symbol of its own.
    """
    values = {"query": site.query, "key": site.key, "value": site.value}
    sizes = {name: node.meta["val"].shape for name, node in values.items()}
    masks = [node.meta["val"].shape for node, _ in site.masks]
    if axis is QUERY:
        found = [sizes["query"][-2], *(m[-2] for m in masks if len(m) > 1)]
    else:
        keys = sizes["key"][-1 if site.key_transposed else -2]
        found = [keys, sizes["value"][-2], *(m[-1] for m in masks if len(m) > 0)]
    first, *rest = (expression(n) for n in found)
    return [first, *(n for n in rest if n != 1)]


def offsets(site: AttentionSite) -> list[Expr]:
    """Nk - Nq, in every way to write it."""
    return [
        sympy.expand(keys - queries)
        for keys in lengths(site, KEY)
        for queries in lengths(site, QUERY)
    ]


def mask_index(site: AttentionSite, rank: int) -> tuple[Expr, ...] | None:
    """(batch, head, query, key) as a mask of this rank sees them; None if it has too many dims.

    With heads folded into the batch, row b of a [B * H, Nq, Nk] mask is b // H, b % H of a 4-D one.
    """
    if rank > 4 or (site.folded and rank == 4 and not site.heads):
        return None
    if not site.folded:
        return BATCH, head_symbol(site.heads or 1), QUERY, KEY
    if rank < 4:
        return BATCH, QUERY, KEY
    return sympy.floor(BATCH / site.heads), sympy.Mod(BATCH, site.heads), QUERY, KEY


def kept(value: Expr) -> Expr:
    """The condition under which an additive mask value is 0.

    Raises:
        NotAMask: if a value can be neither 0 nor at most MASKED_BELOW.
    """
    value = to_number(value)
    if value.is_number:
        if value == 0:
            return sympy.true
        if value.is_extended_real and value <= MASKED_BELOW:
            return sympy.false
        raise NotAMask(f"the constant {describe(value)}")
    if isinstance(value, sympy.Piecewise):
        result, before = sympy.false, sympy.true
        for branch, condition in value.args:
            result = sympy.Or(result, sympy.And(before, condition, kept(branch)))
            before = sympy.And(before, sympy.Not(condition))
        return result
    if isinstance(value, sympy.Add):
        folded = sympy.piecewise_fold(value)
        if isinstance(folded, sympy.Piecewise):
            return kept(folded)
        return sympy.And(*(kept(term) for term in value.args))
    if isinstance(value, sympy.Mul):
        folded = sympy.piecewise_fold(value)
        if isinstance(folded, sympy.Piecewise):
            return kept(folded)
    raise NotAMask(f"its values {describe(value)} are not known to be 0 or below {MASKED_BELOW:g}")


def _without_mask(site: AttentionSite, query_length: Any, context: Context) -> Mask | Reject:
    """One decode step needs no mask: the last token sees every key."""
    if not same_size(query_length, 1):
        return Reject("bidirectional: no mask and not causal", site.output)
    if not _appended(site.key, -1 if site.key_transposed else -2):
        return Reject(
            "one query without a mask whose keys are not a cache that it was appended to: "
            "cross-attention or pooling, for all that can be proved",
            site.output,
        )
    return Mask("causal")


def _appended(key: fx.Node, dim: int) -> bool:
    """Whether the key is torch.cat([past, new], token dim) with one new token."""
    while key.target in _LOOK_THROUGH:
        source = key.args[0]
        assert isinstance(source, fx.Node)
        key = source
    if getattr(key.target, "__name__", "") != "cat.default":
        return False
    parts = key.args[0]
    at = key.args[1] if len(key.args) > 1 else key.kwargs.get("dim", 0)
    rank = len(key.meta["val"].shape)
    if not (isinstance(parts, list | tuple) and isinstance(at, int) and at % rank == dim % rank):
        return False
    last = parts[-1]
    return isinstance(last, fx.Node) and same_size(last.meta["val"].shape[dim], 1)


def _support(atoms: tuple[Expr, ...], site: AttentionSite) -> Mask | Reject:
    causal, padding = False, []
    kinds = [classify_atom(atom, site) for atom in atoms]
    if "causal" not in kinds and any(k.startswith(WINDOW) for k in kinds):
        one = same_size(site.query.meta["val"].shape[-2], 1)
        if not one and not any(k.startswith("causal with") for k in kinds):
            kinds = [ANTI_CAUSAL if k.startswith(WINDOW) else k for k in kinds]
    for atom, kind in zip(atoms, kinds, strict=True):
        if kind == "causal":
            causal = True
        elif kind == "padding":
            padding.append(atom)
        elif kind != "always":
            return Reject(kind, site.masks[0][0] if site.masks else site.output)
    if not causal:
        query_length = site.query.meta["val"].shape[-2]
        if not same_size(query_length, 1) or not _appended(
            site.key, -1 if site.key_transposed else -2
        ):
            return Reject("the mask is not causal", site.masks[0][0])
    if not padding:
        return Mask("causal")
    return Mask("causal & padding", sympy.And(*padding))


def classify_atom(atom: Expr, site: AttentionSite) -> str:
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
        return _always_or(atom, site)
    bound = _at_most_zero(atom)
    if bound is None:
        return f"unsupported mask condition {describe(atom)}"
    by_key, by_query = bound.coeff(KEY), bound.coeff(QUERY)
    rest = sympy.expand(bound - by_key * KEY - by_query * QUERY)
    if rest.has(KEY, QUERY, HEAD, BATCH):
        return f"unsupported mask condition {describe(atom)}"
    if _never_positive(bound, site):
        return "always"
    if (by_key, by_query) == (1, -1):
        known = offsets(site)
        if sympy.expand(-rest) in known:
            return "causal"
        return f"causal with offset {-rest}, where the last query sees the last key at {known[0]}"
    if (by_key, by_query) == (-1, 1):
        return f"{WINDOW} of {sympy.expand(1 + offsets(site)[0] - rest)} tokens"
    # torch's own Max, of the first token that the cache still holds
    if not by_query and any(type(x).__name__ == "Max" for x in sympy.preorder_traversal(rest)):
        return f"{WINDOW}, of a cache that holds no more than it: {describe(atom)}"
    if (by_key, by_query) == (-1, 0) and same_size(site.query.meta["val"].shape[-2], 1):
        return f"{WINDOW} of {sympy.expand(lengths(site, KEY)[0] - rest)} tokens"
    return f"unsupported mask condition {describe(atom)}"


def _always_or(atom: Expr, site: AttentionSite) -> str:
    if any(classify_atom(part, site) == "always" for part in atom.args):
        return "always"
    possible = [p for p in atom.args if classify_atom(sympy.Not(p), site) != "always"]
    if len(possible) == 1 and classify_atom(possible[0], site) == "causal":
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


def _never_positive(bound: Expr, site: AttentionSite) -> bool:
    """Whether a linear bound is <= 0 at every index of the mask."""
    by_query, by_key = bound.coeff(QUERY), bound.coeff(KEY)
    if not (by_query.is_number and by_key.is_number):
        return False
    rest = bound - by_query * QUERY - by_key * KEY
    for queries in lengths(site, QUERY):
        for keys in lengths(site, KEY):
            largest = rest + sympy.Max(0, by_query) * (queries - 1)
            largest = sympy.expand(largest + sympy.Max(0, by_key) * (keys - 1))
            if largest.is_nonpositive is True:
                return True
    return False
