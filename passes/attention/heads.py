"""How attention has its heads: folded into the batch, as a view shows; and views of nothing at all.

Shape letters: B batch, H heads, N tokens, D head dim.
"""

from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.graph.nodes import permutation
from moonfx.passes.graph.operators import CASTS, COPIES, DIVIDE, FOLDS, MULTIPLY


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
