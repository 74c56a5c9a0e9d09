"""The indices that a mask is read at, and the sizes that a proof may use.

Dense attention needs the keys, the values and the mask to agree, so that a proof may use the size
of any of them; each tensor of a KV cache has a symbol of its own.
"""

from dataclasses import dataclass

import sympy

from moonfx.capture.sizes import expression, same_size
from moonfx.passes.symbolic.expressions import Expr
from moonfx.site import AttentionSite

BATCH, HEAD, QUERY, KEY = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j")
)


@dataclass(frozen=True)
class Lengths:
    """How many queries and keys there are, by every symbol that the number goes by.

    Args:
        queries, keys: the first is the tensor's own, the others are equal to it.
        one_query: whether there is one query for every shape, as in a decode step.
        one_key: whether there is one key for every shape, which then is all that a query can see.
    """

    queries: tuple[Expr, ...]
    keys: tuple[Expr, ...]
    one_query: bool
    one_key: bool = False

    @property
    def offsets(self) -> tuple[Expr, ...]:
        """Nk - Nq, in every way to write it."""
        return tuple(sympy.expand(k - q) for k in self.keys for q in self.queries)


def lengths_of(site: AttentionSite) -> Lengths:
    query, key, value = (n.meta["val"].shape for n in (site.query, site.key, site.value))
    masks = [node.meta["val"].shape for node, _ in site.masks]
    queries = [query[-2], *(m[-2] for m in masks if len(m) > 1)]
    keys = [key[-1 if site.key_transposed else -2], value[-2], *(m[-1] for m in masks if len(m))]
    one_query, one_key = same_size(query[-2], 1), same_size(keys[0], 1)
    return Lengths(_names(queries), _names(keys), one_query, one_key)


def _names(sizes: list[object]) -> tuple[Expr, ...]:
    """Distinct expressions of one size; a mask's 1 is broadcast and says nothing."""
    first, *rest = (expression(n) for n in sizes)  # type: ignore[arg-type]
    return tuple(dict.fromkeys([first, *(n for n in rest if n != 1)]))
