"""Finds the blocks of a fused projection: the parts of its output that never meet again.

    qkv = linear(x, w)                     w [3 D, D]
    q, k, v = qkv.chunk(3, -1)             three blocks of rows of w, a matrix each

    q = linear(x, w)                       rotary embedding splits as well, and is no fusion:
    a, b = q.chunk(2, -1)                  what is cut here
    q = cat([a * cos - b * sin, ...])      is one tensor again

Every part of the output that some operator reads as a whole belongs to one block. So do parts that
are added to each other, unless a gate has acted on one of them, and parts that are written into one
tensor that is read, or concatenated and not cut again at the same places. Parts that take the same
place in the same products are the heads of one projection. What is left apart are the blocks; a
pattern of them that a layout cannot say is one matrix.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import ADD, DIVIDE, MULTIPLY, PRODUCTS, SOFTMAX, SUBTRACT, WHERE
from moonfx.passes.parameters.dataflow import (
    WRITES,
    DataFlow,
    FlowValue,
    Worklist,
    base_of,
    values_in,
)
from moonfx.passes.parameters.element_positions import (
    REARRANGE,
    SAME,
    alike,
    by_channel,
    distinct,
    is_pointwise,
    replay_on_positions,
)
from moonfx.passes.parameters.written_states import is_read

_JOINS = {aten.cat.default, aten.stack.default, aten.concat.default, aten.hstack.default}
_NEW_DIM = {aten.stack.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_MEETS = ADD | SUBTRACT | WHERE | _JOINS
_MEETS |= {aten.addcmul.default, aten.rsub.Tensor, aten.lerp.Tensor, aten.maximum.default}
_SCALES = MULTIPLY | DIVIDE | {aten.addcmul.default}
_HEADS = PRODUCTS | {aten.mm.default, aten.scaled_dot_product_attention.default}


class FusedBlocks:
    """Which elements along one dimension of a parameter belong together: a union of sets."""

    def __init__(self, size: int) -> None:
        self.labels = torch.arange(size)
        self.read = torch.zeros(size, dtype=torch.bool)
        self.places: list[tuple[int, object]] = []

    def join(self, positions: Tensor) -> None:
        """Says that elements are read together."""
        self.read[positions] = True
        labels = self.labels[positions].unique()
        if len(labels) > 1:
            self.labels[torch.isin(self.labels, labels)] = labels[0]

    def join_heads(self) -> None:
        """Joins blocks that take the same places in products."""
        places: dict[int, set[object]] = {}
        for position, place in self.places:
            places.setdefault(int(self.labels[position]), set()).add(place)
        first: dict[frozenset[object], int] = {}
        for label, found in places.items():
            self.join(torch.tensor([first.setdefault(frozenset(found), label), label]))


class BlockPattern(NamedTuple):
    """Blocks that repeat: outer times the sizes; sizes () and why, if they are one matrix."""

    outer: int
    sizes: tuple[int, ...]
    why: str = ""


def pattern_of(blocks: FusedBlocks) -> BlockPattern:
    """The blocks as a layout says them."""
    labels, size = blocks.labels, len(blocks.labels)
    if len(labels.unique()) == 1:
        return BlockPattern(1, ())
    if not bool(blocks.read.all()):
        return BlockPattern(1, (), "kept whole: a part of its output is not read")
    ends = torch.cat([(labels[1:] != labels[:-1]).nonzero().flatten() + 1, torch.tensor([size])])
    for end in ends.tolist():
        if size % end == 0 and torch.equal(
            labels.view(-1, end), labels[:end].expand(size // end, end)
        ):
            runs, sizes = labels[:end].unique_consecutive(return_counts=True)
            if len(runs) != len(runs.unique()):
                break
            return BlockPattern(size // end, tuple(sizes.tolist()))
    return BlockPattern(1, (), "kept whole: its blocks do not lie in a pattern that repeats")


def follow(flow: DataFlow, output: FlowValue, positions: Tensor, blocks: FusedBlocks) -> None:
    """Joins what the model reads together of a product's output.

    Args:
        output: the product.
        positions: of each of its elements, the element of the parameter's dimension.
        blocks: of that dimension.
    """
    _Follow(flow, blocks).from_(output, positions)


class _Part(NamedTuple):
    """A value made of a part of the output.

    Args:
        at: positions, in its own shape; a plain set of them where places are lost.
        placed: whether `at` has the value's shape.
        gated: whether something else that the model computes has multiplied it.
        mixed: whether parts met in it of which one was gated. Who reads it reads no block of them,
            but it is still one tensor with what it is concatenated with.
    """

    at: Tensor
    placed: bool
    gated: bool
    mixed: bool = False


class _Follow:
    """The parts of one product's output, in the order in which the run computes them."""

    def __init__(self, flow: DataFlow, blocks: FusedBlocks) -> None:
        self.flow, self.blocks = flow, blocks
        self.parts: dict[FlowValue, _Part | Sequence[_Part]] = {}
        self.bases: dict[FlowValue, Tensor] = {}

    def from_(self, output: FlowValue, positions: Tensor) -> None:
        self.parts[output] = _Part(positions, True, False)
        worklist = Worklist(self.flow, [output])
        for value in worklist:
            if value not in self.parts and not self._reach(value):
                continue
            part = self.parts[value]
            last = value.returned or not value.users
            if isinstance(part, _Part) and last and not part.mixed:
                self.blocks.join(distinct(part.at))
            worklist.add(value.users)

    def _reach(self, user: FlowValue) -> bool:
        """Whether parts of the output can be told apart in what reads them; joins them if not."""
        ours = [x for x in user.reads if x in self.parts]
        if not ours:
            return False
        parts = [p for p in (self.parts[x] for x in ours) if isinstance(p, _Part)]
        if len(parts) < len(ours):
            return self._item(user, ours)
        if user.target in _JOINS and len(ours) == len(user.reads) and all(p.placed for p in parts):
            made = replay_on_positions(user, {x: p.at for x, p in zip(ours, parts, strict=True)})
            if made is not None:
                self.parts[user] = _Part(made, True, any(p.gated for p in parts))
                return True
        if by_channel(user) and user.args[0] is ours[0] and len(ours) == 1 and parts[0].placed:
            one = parts[0].at.narrow(-1, 0, 1)  # the same channels at every place
            return self._pointwise(user, parts[0]._replace(at=one), parts[0].gated)
        if user.target is aten.glu.default and parts[0].placed:
            for at in parts[0].at.chunk(2, user.argument(1, "dim", -1)):
                self.blocks.join(distinct(at))
            return False
        if user.target in WRITES and user.args[0] not in self.parts:
            return is_read(self.flow, user) and self._written(user, ours, parts)
        if (longer := _lengthened(user, ours, parts)) is not None:
            self.parts[user] = parts[0]._replace(at=longer)
            return True
        if user.target in REARRANGE and len(ours) == 1:
            return self._rearranged(user, ours[0], parts[0])
        gated = any(p.gated for p in parts) or self._gates(user)
        if is_pointwise(user) and _one_place(parts):
            return self._pointwise(user, parts[0], gated)
        for x, part in zip(ours, parts, strict=True):
            self._end(user, x, part)
        if user.target not in _MEETS:
            return False
        met = torch.cat([distinct(p.at) for p in parts]).unique()
        mixed = gated if user.target not in _JOINS else len(parts) == 1 and parts[0].mixed
        if not mixed:
            self.blocks.join(met)
        self.parts[user] = _Part(met, False, gated, mixed)
        return True

    def _written(self, user: FlowValue, ours: list[FlowValue], parts: list[_Part]) -> bool:
        """Parts that are written into one tensor are one."""
        for x, part in zip(ours, parts, strict=True):
            self._end(user, x, part)
        at = torch.cat([distinct(p.at) for p in parts])
        base = base_of(user.args[0])
        self.bases[base] = torch.cat([self.bases.get(base, at), at]).unique()
        self.blocks.join(self.bases[base])
        return False

    def _gates(self, user: FlowValue) -> bool:
        """Whether something that the model computes multiplies; an angle of a position does not."""
        others = [x for x in user.reads if x not in self.parts]
        computed = (x for x in others if self.flow.active(x) and self.flow.trained(x))
        return user.target in _SCALES and any(computed)

    def _end(self, user: FlowValue, x: FlowValue, part: _Part) -> None:
        """A part is read as a whole."""
        if part.mixed:
            return
        at = distinct(part.at)
        self.blocks.join(at)
        place = self._place(user, x)
        if place is not None:
            self.blocks.places.append((int(at[0]), place))

    def _place(self, user: FlowValue, x: FlowValue) -> object:
        """The place of a head in attention: which operand of which product; None if it is none."""
        others = [y for y in user.reads if y is not x]
        weights = [y for y in others if self.flow.trained(y) and not self.flow.active(y)]
        if user.target not in _HEADS or weights:
            return None
        equations = [y for y in user.args if isinstance(y, str)]
        position = [y is x for y in values_in(user.args)].index(True)
        return (str(user.target), *equations, position, *map(_are_probabilities, others))

    def _item(self, user: FlowValue, ours: list[FlowValue]) -> bool:
        """One result of a split."""
        items = self.parts[ours[0]]
        if len(ours) > 1 or user.target is not operator.getitem or isinstance(items, _Part):
            return False
        self.parts[user] = items[user.args[1]]
        return True

    def _rearranged(self, user: FlowValue, x: FlowValue, part: _Part) -> bool:
        if not part.placed:
            self.parts[user] = part
            return True
        made = replay_on_positions(user, {x: part.at})
        if made is None:
            self._end(user, x, part)
            return False
        several = isinstance(made, tuple | list)
        self.parts[user] = (
            [part._replace(at=at) for at in made] if several else part._replace(at=made)
        )
        return True

    def _pointwise(self, user: FlowValue, part: _Part, gated: bool) -> bool:
        at, placed = part.at, part.placed
        if placed:
            try:
                at = at.expand(user.shape)
            except RuntimeError:  # a size that only the run knows
                at, placed = distinct(at), False
                self.blocks.join(at)
        self.parts[user] = _Part(at, placed, gated, part.mixed)
        return True


def _lengthened(user: FlowValue, ours: list[FlowValue], parts: list[_Part]) -> Tensor | None:
    """Positions in a part that is longer than before: padded, or with others before or after it.

    They are the same all along the dims that grew, also where the others are.
    """
    others = user.target in _PADS or (user.target in _JOINS and user.target not in _NEW_DIM)
    if not others or len(ours) > 1 or not parts[0].placed or parts[0].mixed:
        return None
    at, shape = parts[0].at, user.shape
    grew = [d for d, (a, b) in enumerate(zip(at.shape, shape, strict=True)) if a != b]
    for dim in grew:
        if at.shape[dim] == 0 or not bool((at == at.narrow(dim, 0, 1)).all()):
            return None
        at = at.narrow(dim, 0, 1)
    return at.expand(shape)


def _one_place(parts: Sequence[_Part]) -> bool:
    """Whether values are made of the same elements at the same places."""
    first, *rest = parts
    return all(p.placed and first.placed and alike(p.at, first.at) for p in rest)


def _are_probabilities(value: FlowValue) -> bool:
    """Whether a value is a softmax, through what values_in it in place."""
    for _ in range(8):
        if value.target in SOFTMAX:
            return True
        if value.target not in REARRANGE | SAME or not value.reads:
            return False
        value = value.reads[0]
    return False
