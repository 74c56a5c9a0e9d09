"""What belongs to one attention alone: nothing else may read it, since the rewrite removes it."""

from collections.abc import Collection, Iterable

import torch
from torch import fx

from moonfx.passes.attention.scores import Scores
from moonfx.passes.context import Context
from moonfx.passes.graph.operators import FILLS, IN_PLACE, SHAPE_ONLY
from moonfx.site import Reject


def used_elsewhere(
    scores: Scores, private: Iterable[Iterable[fx.Node]], results: Collection[fx.Node]
) -> Reject | None:
    """Scores, or anything between them and the product with the values, with another reader.

    Args:
        private: the other nodes of the attention, `results` among them, which remain.
    """
    inner = scores.inner.union(*private)
    own = inner.union(scores.path)
    for node in (*scores.path, *inner):
        users = [u for u in node.users if u.target not in SHAPE_ONLY]
        if node not in results and any(u not in own for u in users):
            names = ", ".join(u.name for u in users)
            several = (
                f"the scores are used more than once, by {names}; only the softmax may read them"
            )
            return Reject(several, node)
    return None


def out_of_place(scores: Scores, context: Context) -> None:
    """Writes what happens in place on the scores as a result of its own, which can die.

    Only after `used_elsewhere`: nothing but the next node of the path sees the difference.
    """
    for node in scores.path:
        operands = [n.meta["val"] for n in node.all_input_nodes]
        kinds = {v.dtype for v in operands if isinstance(v, torch.Tensor) and v.dim()}
        promotes = node.target not in FILLS and kinds != {node.meta["val"].dtype}
        if node.target in IN_PLACE and not promotes:
            node.target = IN_PLACE[node.target]
            context.changed(node.graph)
