"""Proves what a mask is, for every shape.

    before  mask [B, 1, Nq, Nk] from 20 to 35 nodes of arange, le, index, expand, where, ...
    after   site.mask = "causal" or "causal & padding", or site.reject with the part in the way

The mask is read at symbolic indices (batch b, head h, query i, key j) and brought to a conjunction
of conditions. Each condition must be one that the rewrite supports: causal with the offset
Nk - Nq (the last query sees the last key), key padding, or true for every index.
"""

import sympy
from torch import fx

from moonfx.passes.additive import NotAMask, kept
from moonfx.passes.atoms import ANTI_CAUSAL, WINDOW, classify_atom
from moonfx.passes.context import Context
from moonfx.passes.decode_step import appended
from moonfx.passes.expressions import Expr, head_symbol, loads, name_of, to_bool
from moonfx.passes.symbols import BATCH, HEAD, KEY, QUERY, Lengths, lengths_of
from moonfx.site import AttentionSite, Mask, Reject


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
    lengths = lengths_of(site)
    if site.causal and sympy.Integer(0) not in lengths.offsets:
        return Reject(
            "is_causal aligns the first query with the first key, and the key length "
            f"({lengths.keys[0]}) is not proved equal to the query length ({lengths.queries[0]})",
            site.output,
        )
    if not site.masks and not site.causal:
        return _without_mask(site, lengths)

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
    return _support(atoms, site, lengths)


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


def _without_mask(site: AttentionSite, lengths: Lengths) -> Mask | Reject:
    """One decode step needs no mask: the last token sees every key."""
    if not lengths.one_query:
        return Reject("bidirectional: no mask and not causal", site.output)
    if not appended(site):
        return Reject(
            "one query without a mask whose keys are not a cache that it was appended to: "
            "cross-attention or pooling, for all that can be proved",
            site.output,
        )
    return Mask("causal")


def _support(atoms: tuple[Expr, ...], site: AttentionSite, lengths: Lengths) -> Mask | Reject:
    causal, padding = False, []
    kinds = [classify_atom(atom, lengths) for atom in atoms]
    if not lengths.one_query and not any(k.startswith("causal") for k in kinds):
        kinds = [ANTI_CAUSAL if k.startswith(WINDOW) else k for k in kinds]
    for atom, kind in zip(atoms, kinds, strict=True):
        if kind == "causal":
            causal = True
        elif kind == "padding":
            padding.append(atom)
        elif kind != "always":
            return Reject(kind, site.masks[0][0] if site.masks else site.output)
    if not causal and not (lengths.one_query and appended(site)):
        return Reject("the mask is not causal", site.masks[0][0])
    if not padding:
        return Mask("causal")
    return Mask("causal & padding", sympy.And(*padding))
