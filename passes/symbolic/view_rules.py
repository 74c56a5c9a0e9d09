"""Rules for operators that move elements: views, slices, gathers, joins."""

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, axis, dtype, permutation, shape
from moonfx.passes.symbolic.expressions import Expr, Index, Reader, divided, to_number


def same(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return reader.broadcast(node.args[0], index)


def unsqueeze(reader: Reader, node: fx.Node, index: Index) -> Expr:
    dim = axis(node, argument(node, 1, "dim"))
    return reader.read(node.args[0], index[:dim] + index[dim + 1 :])


def permute(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    order = permutation(node)
    if order is None:
        return None
    source: list[Expr] = [0] * len(index)
    for out_dim, in_dim in enumerate(order):
        source[in_dim] = index[out_dim]
    return reader.read(node.args[0], source)


def reshape(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before = reshaped(shape(source), shape(node), index)
    return None if before is None else reader.read(source, before)


def reshaped(before: Sequence[Expr], after: Sequence[Expr], index: Index) -> Index | None:
    """Where an element at an index after a reshape was before it; None if that is not known.

    Args:
        before, after: the sizes.
    """
    groups = reshape_groups(before, after)
    if groups is None:
        return None
    result: list[Expr] = [sympy.Integer(0)] * len(before)
    for ins, outs in groups:
        flat: Expr = sympy.Integer(0)
        for dim in outs:
            flat = flat * after[dim] + (0 if after[dim] == 1 else index[dim])
        wide = [d for d in ins if before[d] != 1]
        for dim in reversed(wide[1:]):
            flat, result[dim] = divided(flat, before[dim])
        if wide:
            result[wide[0]] = flat
    return tuple(result)


def reshape_groups(
    before: Sequence[Expr], after: Sequence[Expr]
) -> list[tuple[list[int], list[int]]] | None:
    """Dims of `before` and `after` cut into shortest runs of equal product, or None if unproved."""
    if 0 in before or 0 in after:
        return None
    groups, i, o = [], 0, 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        have: Expr = sympy.Integer(1)
        want: Expr = sympy.Integer(1)
        if i < len(before):
            have, i = before[i], i + 1
            ins.append(i - 1)
        if o < len(after):
            want, o = after[o], o + 1
            outs.append(o - 1)
        while sympy.expand(have - want) != 0:
            ratio = sympy.simplify(want / have)
            grow_in = ratio > 1 if ratio.is_number else ratio.is_integer
            if grow_in and i < len(before):
                have, i = have * before[i], i + 1
                ins.append(i - 1)
            elif o < len(after):
                want, o = want * after[o], o + 1
                outs.append(o - 1)
            elif i < len(before):
                have, i = have * before[i], i + 1
                ins.append(i - 1)
            else:
                return None
        groups.append((ins, outs))
    return groups


def sliced(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = axis(node, argument(node, 1, "dim", 0))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    begin = position(reader, 0 if start is None else start, shape(source)[dim])
    if begin is None:
        return None
    moved = begin + index[dim] * reader.read(step, ())
    return reader.read(source, (*index[:dim], moved, *index[dim + 1 :]))


def select(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = axis(source, argument(node, 1, "dim"))
    at = position(reader, argument(node, 2, "index"), shape(source)[dim])
    return None if at is None else reader.read(source, (*index[:dim], at, *index[dim:]))


def position(reader: Reader, given: object, size: Expr) -> Expr | None:
    """An index as Python counts it, from the front; None if its sign is not known.

    A start before the front is None too: slice() moves it to 0, which no formula here says.
    """
    at = reader.read(given, ())
    if at.is_negative:
        at = size + at
    return at if at.is_nonnegative else None


def gather(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """x[a, b, ...] and x[:, a]: adjacent index tensors, the other dims whole."""
    source, given = node.args[0], argument(node, 1, "indices")
    assert isinstance(source, fx.Node)
    given = list(given) + [None] * (len(shape(source)) - len(given))
    dims = [d for d, g in enumerate(given) if g is not None]
    kinds = {dtype(given[d]) for d in dims}
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    if not adjacent or kinds & {torch.bool, torch.uint8}:  # uint8 counts as a mask
        return None
    width = max(len(shape(given[d])) for d in dims)
    inner = index[dims[0] : dims[0] + width]
    at = [to_number(reader.broadcast(given[d], inner)) for d in dims]
    if any(x.is_nonnegative is not True for x in at):
        return None
    return reader.read(source, (*index[: dims[0]], *at, *index[dims[0] + width :]))


def padded(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """Padding by nothing, as a library writes it that pads to a size it has already."""
    return reader.read(node.args[0], index) if not any(argument(node, 1, "pad")) else None


def joined(reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """cat, where the index says which part it is in: the first, or none of what is empty."""
    parts, dim = node.args[0], axis(node, argument(node, 1, "dim", 0))
    assert isinstance(parts, list | tuple)
    filled = [p for p in parts if isinstance(p, fx.Node) and 0 not in shape(p)]
    return reader.read(filled[0], index) if len(filled) == 1 and dim >= 0 else None
