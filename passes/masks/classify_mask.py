"""Proves what a mask is, for every shape.

    before  mask [B, 1, Nq, Nk] from 20 to 35 nodes of arange, le, index, expand, where, ...
    after   site.mask = "causal", "all", "... & padding", "... & packed", with a bias of the keys,
            or site.reject with the part in the way

The mask is read at symbolic indices (batch b, head h, query i, key j) and brought to a conjunction
of conditions. Each condition must be one that the rewrite supports: causal with the offset
Nk - Nq (the last query sees the last key), key padding, packed sequences, or true for every index.
"""

import sympy
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.masks.decode_step import appended
from moonfx.passes.masks.prove import Proof, ReadMask, prove
from moonfx.passes.masks.self_attention import same_tokens
from moonfx.passes.masks.static_cache import reason_of
from moonfx.passes.symbolic.expressions import Expr, head_symbol, loads, name_of
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY, Lengths, lengths_of
from moonfx.site import AttentionSite, Declined, Mask


def run(graph: fx.Graph, context: Context) -> int:
    """Classifies the mask of each site found in the graph; returns how many are supported."""
    supported = 0
    for site in context.sites:
        if site.output.graph is not graph or site.reject is not None:
            continue
        try:
            site.mask = classify(site, context)
        except Declined as reason:
            context.decline(site, reason)
        else:
            supported += 1
    return supported


def classify(site: AttentionSite, context: Context) -> Mask:
    """What a site's masks are together.

    Raises:
        Declined: naming the part of a mask that is not proved, or not supported.
    """
    lengths = lengths_of(site)
    if site.causal and sympy.Integer(0) not in lengths.offsets:
        raise Declined(
            "is_causal aligns the first query with the first key, and the key length "
            f"({lengths.keys[0]}) is not proved equal to the query length ({lengths.queries[0]}); "
            "give a mask that ends at the last key",
            site.output,
        )
    given = tuple(_read(node, how, site, context) for node, how in site.masks)
    proof = _proved(given, lengths, site, context)
    if proof.reason:
        node = site.masks[proof.at][0] if site.masks else site.output
        cache = reason_of(site, context) if "cache" in proof.reason else ""
        raise Declined(cache or proof.reason + _already_sparse(proof, site, context), node)
    causal = proof.causal or (lengths.one_query and (lengths.one_key or appended(site, context)))
    if not causal:
        _check_both_ways(site, lengths, context)
    kind = "causal" if causal else "all"
    kind += " & padding" if proof.padding is not None else ""
    kind += " & packed" if proof.segments is not None else ""
    return Mask(kind, proof.padding, proof.segments, proof.bias)


def _read(node: fx.Node, how: str, site: AttentionSite, context: Context) -> ReadMask:
    """A mask at (batch, head, query, key)."""
    index = mask_index(site, len(node.meta["val"].shape))
    if index is None:
        has = f"the mask has {len(node.meta['val'].shape)} dimensions"
        raise Declined(f"{has}; bring it to [batch, heads, queries, keys]", node)
    reader = context.real(site) if how == "additive" else context.reader
    value = reader.broadcast(node, index).subs(head_symbol(site.heads or 1), HEAD)
    written = [x for x in loads(value) if context.mutated(reader.leaf(x))]
    if not written:
        return ReadMask(value, how, site.mask_scales.get(node, 1.0))
    name = name_of(written[0])
    if written[0].has(QUERY, KEY):
        raise Declined(f"the mask is written to in place ('{name}'); use where() instead", node)
    raise Declined(
        f"the mask compares positions with '{name}', which is written to in place (a static "
        "cache? a DynamicCache can be proved)",
        node,
    )


def mask_index(site: AttentionSite, rank: int) -> tuple[Expr, ...] | None:
    """(batch, head, query, key) as a mask of this rank sees them; None if it has too many dims.

    With heads folded into the batch, row b * H + h of a [B * H, Nq, Nk] mask is b, h of a 4-D one;
    where H is not known a row is a batch of its own.
    """
    if rank > 4:
        return None
    if site.folded and not site.unfolds:
        return (BATCH, QUERY, KEY) if rank < 4 else (BATCH, sympy.S.Zero, QUERY, KEY)
    head = head_symbol(site.heads or 1)
    if site.folded and rank == 3:
        return BATCH * (site.heads or 1) + head, QUERY, KEY
    return BATCH, head, QUERY, KEY


def _proved(
    given: tuple[ReadMask, ...], lengths: Lengths, site: AttentionSite, context: Context
) -> Proof:
    """The proof for these masks, made once for all layers that have them."""
    once = (given, lengths, site.causal, site.sees_constants)
    if once not in context.masks:
        context.masks[once] = prove(
            given,
            lengths,
            context.reader,
            is_causal=site.causal,
            sees_constants=site.sees_constants,
        )
    return context.masks[once]


def _already_sparse(proof: Proof, site: AttentionSite, context: Context) -> str:
    """What a user may know of a window in the way: that it is no longer than what MoBA attends."""
    if proof.window is None:
        return ""
    policy = context.likely_policy(site, context.sites, context.root)
    if policy is None:
        return ""
    attended = policy.block * policy.topk
    if (proof.window <= attended) != True:  # noqa: E712
        return ""
    short = f"{proof.window} tokens <= block*topk = {attended}"
    return f", which is already sparse: {short}; nothing to change"


def _check_both_ways(site: AttentionSite, lengths: Lengths, context: Context) -> None:
    """Raises Declined if attention whose queries see later keys cannot be sparse."""
    node = site.masks[0][0] if site.masks else site.output
    if lengths.one_query:
        what = "whose mask hides no later key and" if site.masks else "without a mask"
        raise Declined(
            reason_of(site, context)
            or f"one query {what} whose keys are not a cache that it was appended to: "
            "cross-attention or pooling, for all that can be proved",
            node,
        )
    what = "the mask is not causal" if site.masks else "no mask and not causal"
    if context.causal_only:
        raise Declined(
            f"bidirectional: {what}; causal_only=False makes self-attention sparse", node
        )
    if sympy.Integer(0) not in lengths.offsets:
        raise Declined(
            f"cross-attention: {lengths.queries[0]} queries and {lengths.keys[0]} keys, which are "
            "not proved to be as many",
            node,
        )
    if not same_tokens(site, context):
        raise Declined(
            f"bidirectional ({what}), and query and key are not proved to be projections of the "
            "same tokens: cross-attention, for all that can be proved",
            node,
        )
