"""What belongs to one attention alone: nothing else may read it, since the rewrite removes it."""

from collections.abc import Collection, Iterable

from torch import fx

from moonfx.passes.attention.scores import Scores
from moonfx.passes.graph.operators import SHAPE_ONLY
from moonfx.site import Declined


def check_users(
    scores: Scores, private: Iterable[Iterable[fx.Node]], results: Collection[fx.Node]
) -> None:
    """Checks that nothing else reads scores, or what lies between them and the product with values.

    Args:
        private: the other nodes of the attention, `results` among them, which remain.
    Raises:
        Declined: naming the readers.
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
            raise Declined(several, node)
