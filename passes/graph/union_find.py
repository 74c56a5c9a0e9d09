"""Disjoint sets of things that belong together."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class UnionFind(Generic[Item]):
    """Disjoint sets; what was never joined is a set of its own."""

    def __init__(self) -> None:
        self._parent: dict[Item, Item] = {}

    def find(self, item: Item) -> Item:
        """The representative of an item's set."""
        parents = self._parent
        while (parent := parents.get(item, item)) is not item:
            parents[item] = parents.get(parent, parent)
            item = parent
        return item

    def join(self, first: Item, second: Item) -> None:
        """Makes one set of two; its representative is that of the first."""
        self._parent[self.find(second)] = self.find(first)
