"""Groups that grow together: a union-find.

groups.join(a, b); groups.join(b, c)        groups.of(a) is groups.of(c)
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)


class Groups(Generic[N]):
    """Disjoint groups; what was never joined is a group of its own."""

    def __init__(self) -> None:
        self._parent: dict[N, N] = {}

    def of(self, member: N) -> N:
        """The representative of a member's group: the same for all of them, until the next join."""
        while (parent := self._parent.get(member, member)) is not member:
            self._parent[member] = self._parent.get(parent, parent)
            member = parent
        return member

    def join(self, a: N, b: N) -> None:
        """Makes one group of two; the representative of a's stands for it."""
        self._parent[self.of(b)] = self.of(a)
