"""Walks along what nodes read, or along who reads them, each node once.

    for source in upstream(node, through=is_a_view): ...

For fx nodes, and with `reachable` for whatever else says where to go on.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from torch import fx

N = TypeVar("N", bound=Hashable)


def reachable(start: Iterable[N], onward: Callable[[N], Iterable[N]]) -> Iterator[N]:
    """All that is reached from some nodes, these among them, each once, depth first.

    Args:
        onward: where to go on from a node; asked after the node was given out.
    """
    stack, seen = [*start], set[N]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += onward(node)


def upstream(
    node: fx.Node, through: Callable[[fx.Node], bool] = lambda _: True
) -> Iterator[fx.Node]:
    """A node, and all that it is computed of.

    Args:
        through: whether to go on to what a node reads.
    """
    return reachable([node], lambda n: n.all_input_nodes if through(n) else ())


def downstream(
    node: fx.Node, through: Callable[[fx.Node], bool] = lambda _: True
) -> Iterator[fx.Node]:
    """A node, and all that is computed of it.

    Args:
        through: whether to go on to who reads a node.
    """
    return reachable([node], lambda n: n.users if through(n) else ())
