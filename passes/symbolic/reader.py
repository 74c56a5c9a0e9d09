"""Reads a tensor of the graph as a function of its indices, for every shape.

    mask = arange(N)[None, :] <= arange(N)[:, None]        read at (i, j) gives    j <= i

`Reader.read(node, index)` pulls an index expression back through views, broadcasts, gathers,
comparisons and arithmetic to the leaves. Integers, floats and booleans are sympy expressions; a
leaf whose values are unknown becomes `load_<name>(index...)`, so nothing about it can be proved by
accident. An operation that is not in the table is a leaf as well. Symbols of sizes are the graph's
own, so that what is proved here holds for every shape the graph will run with.
"""

from collections.abc import Callable, Sequence

import sympy
import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value
from moonfx.capture.sizes import expression
from moonfx.passes.graph.nodes import dtype
from moonfx.passes.graph.own_tensors import OwnTensors
from moonfx.passes.symbolic import in_place
from moonfx.passes.symbolic.expressions import (
    Expr,
    Index,
    aligned,
    choose,
    constant,
    head_symbols,
    load_symbol,
    name_of,
    stored,
)
from moonfx.passes.symbolic.in_place import SeenFrom
from moonfx.passes.symbolic.indices import BATCH
from moonfx.passes.symbolic.input_masks import Given, given_of, where_kept
from moonfx.passes.symbolic.rules import RULES


class Reader:
    """Reads nodes at index expressions.

    Args:
        outer: maps a placeholder of a nested body to the node it is called with, or None.
        name: what to call a node in a reason.
        mutated: whether some operator of the graph writes into the node's memory. Its values then
            depend on when it is read: it is a leaf, unless `tensors` says what they are.
        tensors: what the node's graph makes and writes to.
    """

    def __init__(
        self,
        outer: Callable[[fx.Node], fx.Node | None],
        mutated: Callable[[fx.Node], bool],
        name: Callable[[fx.Node], str],
        tensors: Callable[[fx.Node], OwnTensors],
    ) -> None:
        self.outer = outer
        self.name = name
        self.mutated = mutated
        self.tensors = tensors
        self.leaves: dict[str, fx.Node] = {}
        self.constants: dict[fx.Node, tuple[float, float] | Given] = {}
        self._names: dict[fx.Node, str] = {}
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._memo_before: dict[tuple[fx.Node, Index, int], Expr] = {}

    def read(self, node: object, index: Sequence[Expr]) -> Expr:
        """The value of `node` at `index` (one expression per dimension)."""
        if not isinstance(node, fx.Node):
            return constant(node)
        index = tuple(sympy.sympify(x) for x in index)
        if (node, index) not in self._memo:
            self._memo[node, index] = self._read(node, index)
        return self._memo[node, index]

    def broadcast(self, node: object, index: Sequence[Expr]) -> Expr:
        """The value of `node` broadcast to an index of equal or higher rank."""
        if not isinstance(node, fx.Node):
            return constant(node)
        return self.read(node, aligned(node, index))

    def read_before(self, node: object, index: Index, place: int) -> Expr:
        """The value of `node` at `index`, as a node at a place in its graph sees it."""
        if not isinstance(node, fx.Node) or not self.mutated(node):
            return self.read(node, index)
        once = node, index, len(self.tensors(node).writers(node, place))
        if once not in self._memo_before:
            known = in_place.value(self, self.tensors(node), node, index, place)
            self._memo_before[once] = self.load(node, index) if known is None else known
        return self._memo_before[once]

    def load(self, node: fx.Node, index: Index) -> Expr:
        """`node` as an unknown tensor, under a name that no node of another graph shares."""
        if node not in self._names:
            name = self.name(node)
            while name in self.leaves:
                name += "_"
            self._names[node], self.leaves[name] = name, node
        kind = dtype(node)
        whole = kind is not None and not kind.is_floating_point and not kind.is_complex
        value = load_symbol(self._names[node], whole=whole)(*index)
        return sympy.Ne(value, 0) if kind == torch.bool else value

    def leaf(self, load: Expr) -> fx.Node:
        """The node that a load reads."""
        return self.leaves[name_of(load)]

    def _read(self, node: fx.Node, index: Index) -> Expr:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | int | float):
            return expression(value)
        if not isinstance(value, torch.Tensor):
            return self.load(node, index)
        if self.mutated(node):
            return self._as_users_see(node, index)
        if node.op == "placeholder" and (source := self.outer(node)) is not None:
            return self.read(source, index)
        if node.op in ("placeholder", "get_attr"):
            return self._read_constant(node, index)
        return self.value(node, index)

    def value(self, node: fx.Node, index: Index, place: int | None = None) -> Expr:
        """The value of `node` by its operator's rule.

        Args:
            place: before which its operands are read, where something writes to one of them.
        """
        rule = RULES.get(node.target)
        result = rule(self.seen_by(node, place), node, index) if rule is not None else None
        if result is not None:
            result = stored(result, dtype(node))
        return self.load(node, index) if result is None else result

    def seen_by(self, node: fx.Node, place: int | None = None) -> "Reader | SeenFrom":
        """A reader of a node's operands, as they are at its place in the graph or at another."""
        if not any(map(self.mutated, node.all_input_nodes)):
            return self
        return SeenFrom(self, self.tensors(node).position[node] if place is None else place)

    def _as_users_see(self, node: fx.Node, index: Index) -> Expr:
        """The value of a node that is written to, if it is one for all that read it."""
        tensors = self.tensors(node)
        places = {tensors.position[reader] for reader in tensors.readers(node)}
        if len({len(tensors.writers(node, place)) for place in places}) != 1:
            return self.load(node, index)
        return self.read_before(node, index, max(places))

    def _read_constant(self, node: fx.Node, index: Index) -> Expr:
        """A buffer or a constant tensor: one repeated value, or a triangle. Or a `Given` mask."""
        value = buffer_value(node)
        known = None if value is None else summary(value)
        if known is None:
            given = given_of(node)
            if given is None or _of_a_row(index):  # [B, Nk] may look like it, where B < Nk
                return self.load(node, index)
            self.constants[node] = given
            real = where_kept(node, index, self.load)
            return choose(real, constant(given.kept), constant(given.hidden))
        self.constants[node] = known
        on_and_below, above = (constant(x) for x in known)
        if on_and_below == above:
            return on_and_below
        return choose(sympy.Le(index[-1], index[-2]), on_and_below, above)


def _of_a_row(index: Index) -> bool:
    """Whether a mask's last dim but one is read at rows of the batch, or heads, not queries."""
    return bool(sympy.sympify(index[-2]).free_symbols & {BATCH, *head_symbols()})


def summary(value: torch.Tensor) -> tuple[float, float] | None:
    """(on and below, above the diagonal) of a tensor that holds just these values, else None."""
    if value.numel() == 0 or value.dtype.is_complex:
        return None
    first = value.flatten()[0]
    if bool((value == first).all()):
        return first.item(), first.item()
    return _triangle(value)


def _triangle(value: torch.Tensor) -> tuple[float, float] | None:
    """(on and below, above the diagonal) if the last two dims hold just these two values."""
    if value.ndim < 2 or min(value.shape[-2:]) < 2:
        return None
    flat = value.reshape(-1, *value.shape[-2:])
    lower = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    below, above = flat[0, 0, 0], flat[0, 0, -1]
    if bool((flat == torch.where(lower, below, above)).all()):
        return below.item(), above.item()
    return None
