"""A walk along what nodes read, each node once.

for source in upstream([node], stop=is_a_view): ...
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

N = TypeVar("N", bound=Hashable)


def _inputs(node: Any) -> Iterable[Any]:
    """What an fx node reads."""
    return node.all_input_nodes


def upstream(
    start: Iterable[N],
    stop: Callable[[N], bool] = lambda _: False,
    inputs: Callable[[N], Iterable[N]] = _inputs,
) -> Iterator[N]:
    """Some nodes, and all that they are computed of, each once, depth first.

    Args:
        stop: which nodes are given, and not what they read.
        inputs: what a node reads, asked after it was given.
    """
    stack, seen = [*start], set[N]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            stack += inputs(node)
