"""Heads: keys and values before repeat_kv, and heads folded into the batch or cut in two.

    before  k [B, Hkv, N, D] -> unsqueeze -> expand [B, Hkv, G, N, D] -> reshape [B, Hq, N, D]
    after   k [B, Hkv, N, D], for attention with Hq = G * Hkv

    before  q [B, Hkv, G, N, D] @ k [B, Hkv, 1, D, N] -> ... @ v [B, Hkv, 1, N, D]
    after   attention of q.flatten(1, 2) with k.squeeze(2), v.squeeze(2) -> unflatten

Shape letters: B batch, Hq query heads, Hkv key/value heads, G group, N tokens, D head dim.
"""

from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.attention import output_strides as layout
from moonfx.passes.graph.nodes import argument, insert, permutation
from moonfx.passes.graph.operators import CASTS, COPIES, DIVIDE, FOLDS, MULTIPLY
from moonfx.site import AttentionSite, Reject

aten = torch.ops.aten

_JOINS = {aten.cat.default, aten.stack.default}


def fold_groups(site: AttentionSite) -> None:
    """Takes key and value before repeat_kv, if both were repeated by the same group size."""
    if site.folded:
        return
    key, value = ungrouped(site.key, 1, site.output), ungrouped(site.value, 1, site.output)
    if key is None or value is None:
        return
    if same_size(key.meta["val"].shape[1], value.meta["val"].shape[1]):
        site.key, site.value = key, value


def ungrouped(node: fx.Node, dim: int, before: fx.Node) -> fx.Node | None:
    """x with node == repeat_interleave(x, group, dim), or None."""
    node = whole(node)
    if node.op != "call_function":
        return None
    if (order := permutation(node)) is not None:
        inner = ungrouped(node.args[0], order[dim], before)  # type: ignore[arg-type]
        if inner is None:
            return None
        return insert(aten.permute.default, (inner, order), before)
    if node.target is aten.repeat_interleave.self_int:
        source, along = node.args[0], argument(node, 2, "dim")
        same = isinstance(along, int) and along % len(node.meta["val"].shape) == dim
        return source if same else None  # type: ignore[return-value]
    if node.target not in FOLDS:
        return _one_repeated(node, dim)
    wide = whole(node.args[0])
    before_fold, after = wide.meta["val"].shape, node.meta["val"].shape
    if len(before_fold) != len(after) + 1 or not same_size(
        after[dim], before_fold[dim] * before_fold[dim + 1]
    ):
        return None
    kept = [d for d in range(len(before_fold)) if d not in (dim, dim + 1)]
    rest = [d for d in range(len(after)) if d != dim]
    if not all(same_size(before_fold[a], after[b]) for a, b in zip(kept, rest, strict=True)):
        return None
    narrow = _one_repeated(wide, dim + 1)
    if narrow is None:
        return None
    if narrow.target is aten.unsqueeze.default:
        at = int(narrow.args[1]) % len(before_fold)  # type: ignore[arg-type]
        if at == dim + 1:
            return whole(narrow.args[0])
    return insert(aten.squeeze.dim, (narrow, dim + 1), before)


def _one_repeated(node: fx.Node, dim: int) -> fx.Node | None:
    """x with size 1 at dim, that was repeated along dim and nowhere else; None if it was not."""
    if node.target in _JOINS:
        parts, along = node.args[0], int(argument(node, 1, "dim", 0))
        assert isinstance(parts, list | tuple)
        first = parts[0]
        if not isinstance(first, fx.Node) or any(p is not first for p in parts):
            return None
        if along % len(node.meta["val"].shape) != dim:
            return None
        if node.target is aten.stack.default:
            return insert(aten.unsqueeze.default, (first, dim), node)
        return first if same_size(first.meta["val"].shape[dim], 1) else None
    if node.target not in (aten.expand.default, aten.repeat.default):
        return None
    source = whole(node.args[0])
    wide, narrow = node.meta["val"].shape, source.meta["val"].shape
    if len(wide) != len(narrow) or not same_size(narrow[dim], 1):
        return None
    kept = all(same_size(wide[d], narrow[d]) for d in range(len(wide)) if d != dim)
    return source if kept else None


def whole(node: Any) -> Any:
    """The node behind copies and slices that take everything, as x[:, :, None] leaves them."""
    while isinstance(node, fx.Node) and (node.target in COPIES or _takes_everything(node)):
        node = node.args[0]
    return node


def _takes_everything(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)


def untranspose(site: AttentionSite) -> None:
    """Takes key^T = transpose(key) apart, so that repeat_kv is seen and nothing is transposed."""
    rank = len(site.key.meta["val"].shape)
    if permutation(site.key) == [*range(rank - 2), rank - 1, rank - 2]:
        site.key, site.key_transposed = site.key.args[0], False  # type: ignore[assignment]


def views_itself(node: fx.Node) -> bool:
    """Whether a view gives a tensor the shape that it has."""
    source = node.args[0] if node.target in FOLDS else None
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) == len(after) and all(map(same_size, before, after))


def folded_heads(node: fx.Node) -> int | None:
    """H of a view between [B, H, Nq, Nk] and [B * H, Nq, Nk], in either direction, else None."""
    source = node.args[0] if node.target in FOLDS else None
    if not isinstance(source, fx.Node):
        return None
    wide, narrow = sorted((source.meta["val"].shape, node.meta["val"].shape), key=len, reverse=True)
    if (len(wide), len(narrow)) != (4, 3) or not isinstance(wide[1], int):
        return None
    kept = same_size(wide[2], narrow[1]) and same_size(wide[3], narrow[2])
    return wide[1] if kept and same_size(wide[0] * wide[1], narrow[0]) else None


def heads_in_batch(query: fx.Node) -> int | None:
    """H of a query [B * H, N, D] that was viewed so from [B, H, N, D] or [N, B, H * D]."""
    node = query
    while True:
        sources = [a for a in node.args if isinstance(a, fx.Node)]
        if folded_heads(node) is not None or not sources:
            return folded_heads(node)
        source = sources[0]
        if node.target in FOLDS:
            before, after = source.meta["val"].shape, node.meta["val"].shape
            if len(before) != 3 or len(after) != 3 or not isinstance(after[-1], int):
                return None
            heads, rest = divmod(before[-1], after[-1]) if isinstance(before[-1], int) else (0, 1)
            same = same_size(before[0], after[0]) and same_size(before[1] * heads, after[1])
            return heads if same and not rest else None
        passes = CASTS | COPIES | MULTIPLY | DIVIDE
        if permutation(node) != [1, 0, 2] and node.target not in passes:
            return None
        node = source


def unfold_heads(site: AttentionSite) -> Reject | None:
    """Brings attention over [B * H, N, D] to [B, H, N, D], for what differs by head."""
    at, heads = site.output, site.heads
    if not heads:
        unknown = "the heads lie in the batch, and how many they are is not known; unflatten them"
        return Reject(unknown, at)
    for node, _ in site.masks:
        sizes = node.meta["val"].shape
        if len(sizes) == 3 and not same_size(sizes[0], 1):
            return Reject("the mask lies in the batch with the heads, the sink logits do not", node)

    def unfolded(node: fx.Node) -> fx.Node:
        return insert(aten.unflatten.int, (node, 0, [-1, heads]), at)

    site.query, site.key, site.value = map(unfolded, (site.query, site.key, site.value))
    after = at.next
    site.output = insert(aten.unflatten.int, (at, 0, [-1, heads]), after, at)
    back = insert(aten.flatten.using_ints, (site.output, 0, 1), after, at)
    own = {site.output, back}
    at.replace_all_uses_with(back, delete_user_cb=lambda user: user not in own)
    site.folded = False
    return None


def unfold_product(site: AttentionSite) -> Reject | None:
    """Brings query @ key^T over [B * H, N, N] to the [B, H, N, N] that the softmax sees it as."""
    heads, value = site.heads, site.value.meta["val"]
    if not heads or not same_size(value.shape[1], heads):
        return Reject(
            "query and key have their heads in the batch, and value has others", site.output
        )
    for node, _ in site.masks:
        if len(node.meta["val"].shape) == 3:
            return Reject("the mask lies in the batch with the heads, the value does not", node)
    site.query, site.key = (
        insert(aten.unflatten.int, (node, 0, [-1, heads]), site.output)
        for node in (site.query, site.key)
    )
    site.folded = False
    return None


# --- two head dims --------------------------------------------------------------------------------


def merge_heads(site: AttentionSite) -> Reject | None:
    """Brings attention over [B, X, Y, N, D], heads cut in two, to [B, X * Y, N, D].

    A dim along which keys and values have size 1 is that of the group, and comes second.
    """
    tensors = {"query": site.query, "key": site.key, "value": site.value, "output": site.output}
    sizes = {name: node.meta["val"].shape for name, node in tensors.items()}
    if any(len(s) != 5 for s in sizes.values()):
        return None
    cut = sizes["query"][1:3]
    if not all(isinstance(n, int) for n in cut):
        return Reject("the number of heads is not a constant of the graph", site.query)
    if not all(map(same_size, sizes["output"][:3], sizes["query"][:3])):
        return Reject("the mask or the keys broadcast the query to another shape", site.output)
    for node, _ in site.masks:
        over = node.meta["val"].shape[-4:-2] if len(node.meta["val"].shape) == 5 else ()
        aligned = [*over] if over else [*node.meta["val"].shape[:-2]][-2:]
        if len(node.meta["val"].shape) > 2 and not all(same_size(n, 1) for n in aligned):
            differs = (
                "the mask of attention whose heads are cut in two differs by head; use one mask"
            )
            return Reject(differs, node)
    if site.sink_logits is not None:
        return Reject("attention sink logits where the heads are cut in two", site.sink_logits)

    at = site.output
    narrow = {(name, d): _narrow(tensors[name], d) for name in ("key", "value") for d in (1, 2)}
    shared = [d for d in (1, 2) if all(narrow[name, d] is not None for name in ("key", "value"))]
    if any(
        narrow[name, d] is not None for name, d in narrow if d not in shared and cut[d - 1] != 1
    ):
        return Reject("keys and values are shared by different groups of heads", at)
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
    own = {first, site.output, back}
    at.replace_all_uses_with(back, delete_user_cb=lambda user: user not in own)
    return None


def _narrow(node: fx.Node, dim: int) -> fx.Node | None:
    """Keys or values with size 1 along a dim that attention repeats them along, or None."""
    if same_size(node.meta["val"].shape[dim], 1):
        return node
    return _one_repeated(whole(node), dim)


def _without_heads(mask: fx.Node, before: fx.Node) -> fx.Node:
    """A mask [B, 1, 1, N, N] or [1, 1, N, N] or less as one of at most four dims."""
    rank = len(mask.meta["val"].shape)
    return insert(aten.squeeze.dim, (mask, -3), before) if rank >= 4 else mask
