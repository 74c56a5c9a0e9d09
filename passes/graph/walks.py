"""Walks over a graph: all that a node is made of, all that is made of it."""

from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

from torch import fx

Item = TypeVar("Item")


def reachable(
    start: Iterable[Item],
    following: Callable[[Item], Iterable[Item]],
    stop: Callable[[Item], bool] = lambda item: False,
) -> set[Item]:
    """What one comes to from `start`, which is part of it.

    Args:
        following: what comes after an item.
        stop: which items are left out, and with them what is reached through them only.
    """
    found: set[Item] = set()
    stack = list(start)
    while stack:
        item = stack.pop()
        if item not in found and not stop(item):
            found.add(item)
            stack += following(item)
    return found


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def upstream(
    start: Iterable[fx.Node],
    *,
    stop: Callable[[fx.Node], bool] = lambda node: False,
    inputs: Callable[[fx.Node], Iterable[fx.Node]] = _inputs,
) -> set[fx.Node]:
    """Nodes and what they are made of, in their graph; see `reachable`."""
    return reachable(start, inputs, stop)


def downstream(
    start: Iterable[fx.Node],
    *,
    stop: Callable[[fx.Node], bool] = lambda node: False,
    users: Callable[[fx.Node], Iterable[fx.Node]] = _users,
) -> set[fx.Node]:
    """Nodes and what is made of them, in their graph; see `reachable`."""
    return reachable(start, users, stop)


def look_through(node: fx.Node, operators: Container[Any]) -> fx.Node:
    """The first node above that is not one of these operators, each of which is of its first
    argument: what a cast, copy or view stands for."""
    while node.target in operators:
        node = node.args[0]  # type: ignore[assignment]
    return node
