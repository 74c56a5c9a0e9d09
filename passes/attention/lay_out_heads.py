"""Brings each attention that was found to [B, H, N, D], by views.

    before  k [B, Hkv, N, D] -> unsqueeze -> expand [B, Hkv, G, N, D] -> reshape [B, Hq, N, D]
    after   k [B, Hkv, N, D], for attention with Hq = G * Hkv

    before  q [B, Hkv, G, N, D] @ k [B, Hkv, 1, D, N] -> ... @ v [B, Hkv, 1, N, D]
    after   attention of q.flatten(1, 2) with k.squeeze(2), v.squeeze(2) -> unflatten

    before  q [B * H, N, D], ..., where something differs by head
    after   attention of q.unflatten(0, (-1, H)), ... -> flatten

Then checks that the operator takes what came of it, at the place and in the modes of the output.
Views that a site needs stay without users where it is not rewritten, and are removed at the end.

Shape letters: B batch, Hq query heads, Hkv key/value heads, G group, N tokens, D head dim.
"""

from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.attention import output_strides as layout
from moonfx.passes.attention.hazards import check_modes, check_writes
from moonfx.passes.attention.heads import heads_in_batch
from moonfx.passes.attention.repeated_heads import one_repeated, uncopied, ungrouped
from moonfx.passes.attention.shapes import check_shapes
from moonfx.passes.attention.upstream import constant_of
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import insert, permutation
from moonfx.site import AttentionSite, Declined

aten = torch.ops.aten


def run(graph: fx.Graph, context: Context) -> int:
    """Lays out the sites of the graph; returns how many the operator takes."""
    laid_out = 0
    for site in context.sites:
        if site.output.graph is not graph or site.reject is not None:
            continue
        known = len(graph.nodes)
        try:
            lay_out(site, context)
            if len(graph.nodes) != known:
                context.changed(graph)
            check_shapes(site)
            check_writes(site, context)
            check_modes(site, context)
        except Declined as reason:
            context.decline(site, reason)
            context.changed(graph)
        else:
            site.laid_out, laid_out = True, laid_out + 1
    return laid_out


def lay_out(site: AttentionSite, context: Context) -> None:
    """Writes the views of one site.

    Raises:
        Declined: if no view brings its operands to the shapes of the operator.
    """
    if site.tokens_first:
        _heads_before_tokens(site, context)
    if site.folded and site.heads is None:
        site.heads = heads_in_batch(site.query)
    if site.key_transposed:
        if site.folded and len(site.value.meta["val"].shape) == 4:
            site.masks = [m for m in site.masks if constant_of(m[0], context) != 0]
            _unfold_product(site)
        _untranspose(site)
        _merge_heads(site, context)
        if site.folded and site.sink_logits is not None:
            _unfold_heads(site, context)
    _fold_groups(site)
    _expand_batch(site)


def _heads_before_tokens(site: AttentionSite, context: Context) -> None:
    """Brings operands and output [B, N, H, D] to [B, H, N, D]."""
    at = site.output
    site.query, site.key, site.value = (
        insert(aten.transpose.int, (x, 1, 2), at) for x in (site.query, site.key, site.value)
    )
    after = at.next
    site.output = insert(aten.transpose.int, (at, 1, 2), after, at)
    back = insert(aten.transpose.int, (site.output, 1, 2), after, at)
    context.replaced(at, back, but={site.output, back})


def _fold_groups(site: AttentionSite) -> None:
    """Takes key and value before repeat_kv, if both were repeated by the same group size."""
    if site.folded:
        return
    key, value = ungrouped(site.key, 1, site.output), ungrouped(site.value, 1, site.output)
    if key is None or value is None:
        return
    if same_size(key.meta["val"].shape[1], value.meta["val"].shape[1]):
        site.key, site.value = key, value


def _untranspose(site: AttentionSite) -> None:
    """Takes key^T = transpose(key) apart, so that repeat_kv is seen and nothing is transposed."""
    rank = len(site.key.meta["val"].shape)
    if permutation(site.key) == [*range(rank - 2), rank - 1, rank - 2]:
        site.key, site.key_transposed = site.key.args[0], False  # type: ignore[assignment]


def _unfold_heads(site: AttentionSite, context: Context) -> None:
    """Brings attention over [B * H, N, D] to [B, H, N, D], for what differs by head."""
    at, heads = site.output, site.heads
    if not heads:
        unknown = "the heads lie in the batch, and how many they are is not known; unflatten them"
        raise Declined(unknown, at)
    for node, _ in site.masks:
        sizes = node.meta["val"].shape
        if len(sizes) == 3 and not same_size(sizes[0], 1):
            raise Declined(
                "the mask lies in the batch with the heads, the sink logits do not", node
            )

    def unfolded(node: fx.Node) -> fx.Node:
        return insert(aten.unflatten.int, (node, 0, [-1, heads]), at)

    site.query, site.key, site.value = map(unfolded, (site.query, site.key, site.value))
    after = at.next
    site.output = insert(aten.unflatten.int, (at, 0, [-1, heads]), after, at)
    back = insert(aten.flatten.using_ints, (site.output, 0, 1), after, at)
    context.replaced(at, back, but={site.output, back})
    site.folded = False


def _unfold_product(site: AttentionSite) -> None:
    """Brings query @ key^T over [B * H, N, N] to the [B, H, N, N] that the softmax sees it as."""
    heads, value = site.heads, site.value.meta["val"]
    if not heads or not same_size(value.shape[1], heads):
        raise Declined(
            "query and key have their heads in the batch, and value has others", site.output
        )
    for node, _ in site.masks:
        if len(node.meta["val"].shape) == 3:
            raise Declined("the mask lies in the batch with the heads, the value does not", node)
    site.query, site.key = (
        insert(aten.unflatten.int, (node, 0, [-1, heads]), site.output)
        for node in (site.query, site.key)
    )
    site.folded = False


def _merge_heads(site: AttentionSite, context: Context) -> None:
    """Brings attention over [B, X, Y, N, D], heads cut in two, to [B, X * Y, N, D].

    A dim along which keys and values have size 1 is that of the group, and comes second.
    """
    tensors = {"query": site.query, "key": site.key, "value": site.value, "output": site.output}
    if any(len(node.meta["val"].shape) != 5 for node in tensors.values()):
        return
    _check_cut_heads(site)
    cut = site.query.meta["val"].shape[1:3]
    at = site.output
    narrow = {(name, d): _narrow(tensors[name], d) for name in ("key", "value") for d in (1, 2)}
    shared = [d for d in (1, 2) if all(narrow[name, d] is not None for name in ("key", "value"))]
    if any(
        narrow[name, d] is not None for name, d in narrow if d not in shared and cut[d - 1] != 1
    ):
        raise Declined("keys and values are shared by different groups of heads", at)
    group = shared[-1] if shared else 2
    swap = group == 1 and cut[1] != 1

    def merged(node: fx.Node) -> fx.Node:
        node = insert(aten.transpose.int, (node, 1, 2), at) if swap else node
        return insert(aten.flatten.using_ints, (node, 1, 2), at)

    site.query = merged(site.query)
    site.key = merged(narrow["key", group] or site.key)
    site.value = merged(narrow["value", group] or site.value)
    merged_masks = [(node, _without_heads(node, at), how) for node, how in site.masks]
    site.masks = [(new, how) for _, new, how in merged_masks]
    site.mask_scales = {new: site.mask_scales.get(old, 1.0) for old, new, _ in merged_masks}
    first = insert(aten.transpose.int, (at, 1, 2), at.next, at) if swap else at
    after = first.next
    site.output = insert(aten.flatten.using_ints, (first, 1, 2), after, at)
    sizes_back = [cut[1], cut[0]] if swap else [*cut]
    back = insert(aten.unflatten.int, (site.output, 1, sizes_back), after, at)
    if swap:
        back = insert(aten.transpose.int, (back, 1, 2), after, at)
        with at.graph.inserting_before(after):
            back = layout.copied(at.meta["val"], back)
    context.replaced(at, back, but={first, site.output, back})


def _check_cut_heads(site: AttentionSite) -> None:
    """Checks that two dims of heads may become one, for everything that depends on the head."""
    query, output = (node.meta["val"].shape for node in (site.query, site.output))
    if not all(isinstance(n, int) for n in query[1:3]):
        raise Declined("the number of heads is not a constant of the graph", site.query)
    if not all(map(same_size, output[:3], query[:3])):
        raise Declined("the mask or the keys broadcast the query to another shape", site.output)
    for node, _ in site.masks:
        sizes = node.meta["val"].shape
        heads = [*sizes[-4:-2]] if len(sizes) == 5 else [*sizes[:-2]][-2:]
        if len(sizes) > 2 and not all(same_size(n, 1) for n in heads):
            differs = "the mask of attention whose heads are cut in two differs by head"
            raise Declined(f"{differs}; use one mask", node)
    if site.sink_logits is not None:
        raise Declined("attention sink logits where the heads are cut in two", site.sink_logits)


def _narrow(node: fx.Node, dim: int) -> fx.Node | None:
    """Keys or values with size 1 along a dim that attention repeats them along, or None."""
    if same_size(node.meta["val"].shape[dim], 1):
        return node
    return one_repeated(uncopied(node), dim)


def _without_heads(mask: fx.Node, before: fx.Node) -> fx.Node:
    """A mask [B, 1, 1, N, N] or [1, 1, N, N] or less as one of at most four dims."""
    rank = len(mask.meta["val"].shape)
    return insert(aten.squeeze.dim, (mask, -3), before) if rank >= 4 else mask


def _expand_batch(site: AttentionSite) -> None:
    """Repeats keys and values of one row for every row of the queries, as attention itself does."""
    rows = site.query.meta["val"].shape[0]
    many: Any = rows
    if site.folded:
        return
    for name in ("key", "value"):
        node: fx.Node = getattr(site, name)
        sizes = list(node.meta["val"].shape)
        if len(sizes) == 4 and same_size(sizes[0], 1) and not same_size(many, 1):
            if not isinstance(rows, int):
                rows = insert(aten.sym_size.int, (site.query, 0), site.output)
            wide = insert(aten.expand.default, (node, [rows, -1, -1, -1]), site.output)
            setattr(site, name, wide)
