"""Part of a reshaped tensor's dim is where it was in the original, element by element."""

import itertools
import math

import pytest
import sympy

from moonfx.passes.masks.pieces import Piece, before_reshape

RESHAPES = [
    ((2, 3, 4), (6, 4)),
    ((6, 4), (2, 3, 4)),
    ((6, 4), (2, 3, 2, 2)),
    ((2, 12), (2, 3, 4)),
    ((4, 6), (8, 3)),
    ((2, 2, 3), (4, 3)),
    ((4, 1, 6), (4, 6)),
    ((4, 6), (4, 1, 6)),
    ((2, 1, 3, 2), (6, 1, 2)),
]


def at(element: int, sizes: tuple[int, ...], dim: int) -> int:
    """The index along a dim of the element that is so many-th in memory."""
    return element // math.prod(sizes[dim + 1 :]) % sizes[dim]


def pieces_of(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [
        (dim, stride, size)
        for dim, whole in enumerate(sizes)
        for stride, size in itertools.product(range(1, whole + 1), repeat=2)
        if whole % (stride * size) == 0
    ]


@pytest.mark.parametrize(("before", "after"), RESHAPES)
def test_a_piece_before_a_reshape_counts_the_same_elements(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    followed = 0
    for dim, stride, size in pieces_of(after):
        piece = Piece(dim, sympy.Integer(stride), sympy.Integer(size))
        found = before_reshape(piece, *(tuple(map(sympy.Integer, s)) for s in (before, after)))
        followed += found is not None and size > 1
        for element in range(math.prod(before)) if found is not None else ():
            count = 0
            for p in found:
                count = count * int(p.size) + at(element, before, p.dim) // int(p.stride) % p.size
            assert count == at(element, after, dim) // stride % size
    assert followed


def test_batch_and_tokens_of_any_length_are_told_apart() -> None:
    b, n = sympy.symbols("b n", integer=True, positive=True)
    eight, one = sympy.Integer(8), sympy.S.One
    merged, apart = (b * n, eight), (b, n, eight)
    assert before_reshape(Piece(0, one, b), merged, apart) == (Piece(0, n, b),)
    assert before_reshape(Piece(1, one, n), merged, apart) == (Piece(0, one, n),)
    assert before_reshape(Piece(0, one, n), apart, merged) == (Piece(1, one, n),)
    assert before_reshape(Piece(0, n, b), apart, merged) == (Piece(0, one, b),)
    assert before_reshape(Piece(0, b, n), apart, merged) is None
    assert before_reshape(Piece(0, one, eight), (n, eight), (eight, n)) is None
