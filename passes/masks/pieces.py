"""Part of a dim, and where it lies in the tensor that a reshape was made from.

[B, N, C] -> [B * N, C]      of dim 0: N are its elements one apart, B those that are N apart
"""

import functools
from typing import NamedTuple

import sympy

from moonfx.passes.symbolic.expressions import Expr
from moonfx.passes.symbolic.view_rules import reshape_groups

Sizes = tuple[Expr, ...]


class Piece(NamedTuple):
    """Elements of a dim: `size` of them, `stride` apart.

    Dim None: along it a tensor is the same, or has features of one token.
    """

    dim: int | None
    stride: Expr
    size: Expr


Axis = tuple[Piece, ...]  # from the slowest to the fastest


def all_of(dim: int, size: Expr) -> Piece:
    return Piece(dim, sympy.S.One, size)


def no_dim(size: Expr) -> Piece:
    return Piece(None, sympy.S.One, size)


@functools.lru_cache(maxsize=4096)
def before_reshape(piece: Piece, before: Sizes, after: Sizes) -> Axis | None:
    """A piece of the reshaped tensor in the original, or None if that is not proved.

    Of size 1 it is nowhere, unless there is but one dim that it can be.
    """
    for ins, outs in _groups(before, after) or ():
        if piece.dim not in outs:
            continue
        if piece.size == 1:
            ones = [d for d in ins if before[d] == 1]
            return (all_of(ones[0], sympy.S.One),) if len(ones) == 1 else ()
        faster = sympy.Mul(*(after[d] for d in outs if d > piece.dim))
        return _split(piece.stride * faster, piece.size, ins, before)
    return () if piece.size == 1 else None


@functools.lru_cache(maxsize=4096)
def _groups(before: Sizes, after: Sizes) -> list[tuple[list[int], list[int]]] | None:
    return reshape_groups(before, after)


def _split(stride: Expr, size: Expr, dims: list[int], sizes: Sizes) -> Axis | None:
    """`size` elements, `stride` apart, of what these dims are together: as pieces of each."""
    found: Axis = ()
    for dim in reversed(dims):
        room = sizes[dim] / stride
        if room == 1 or not room.is_integer:  # it lies in slower dims
            stride = stride / sizes[dim]
            if not stride.is_integer:
                return None
        elif (room / size).is_integer:
            return (Piece(dim, stride, size), *found)
        elif (size / room).is_integer:
            found = (Piece(dim, stride, room), *found)
            stride, size = sympy.S.One, size / room
        else:
            return None
    return None
