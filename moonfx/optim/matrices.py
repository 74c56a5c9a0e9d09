"""Where the matrices lie in a parameter.

    [m, n]                        one matrix, a Linear's weight
    [m, k, h, w]                  one matrix [m, k h w], a convolution's filters
    [e, m, n]                     e matrices, an expert each
    [q + k + v, n]                three matrices, each a block of rows of one fused projection
    [heads * (q + k + v), n]      the same with the blocks of each head beside each other

A piece is a view of the parameter, or of a tensor of its shape, in which the numbers of `b`
matrices [m, n] follow each other row by row. So it goes straight into and out of a contiguous
[b, m, n] that is viewed in the piece's own shape.
"""

import math
from typing import NamedTuple

from torch import Tensor

KINDS = ("matrix", "flatten", "batch")
Shape = tuple[int, int, int]


class Layout(NamedTuple):
    """Where the matrices lie in a parameter.

    Attributes:
        kind: "matrix" [m, n], "flatten" [m, ...] as [m, n], or "batch" [..., m, n].
        dim: of a fused parameter, the dimension of the matrix along which its blocks lie: 0 for
            rows (of a Linear), 1 for columns (of Hugging Face's Conv1D).
        outer: how often the pattern of blocks repeats along `dim`.
        sizes: the length of each block in one repetition; () if the parameter is not fused.
    """

    kind: str = "matrix"
    dim: int = 0
    outer: int = 1
    sizes: tuple[int, ...] = ()


class Piece(NamedTuple):
    """A view of a tensor, and the shape (b, m, n) of the matrices in it."""

    view: Tensor
    shape: Shape


def pieces(tensor: Tensor, layout: Layout) -> list[Piece]:
    """The matrices of a tensor, without a copy, in the order of `shapes`.

    Raises:
        ValueError: if the layout does not fit the tensor's shape.
    """
    found = shapes(tuple(tensor.shape), layout)
    if not layout.sizes:
        return [Piece(tensor, found[0])]
    dim = tensor.ndim - 2 + layout.dim
    if layout.outer > 1:
        tensor = tensor.unflatten(dim, (layout.outer, sum(layout.sizes)))
        dim += 1
    return [Piece(*x) for x in zip(tensor.split(layout.sizes, dim), found, strict=True)]


def single(tensor: Tensor, layout: Layout) -> list[list[Tensor]]:
    """The matrices of a contiguous tensor one by one, in a list for each of its `pieces`."""
    batched = layout.kind == "batch"
    return [
        list(view.view(shape[0], *view.shape[tensor.ndim - 2 :]).unbind()) if batched else [view]
        for view, shape in pieces(tensor, layout)
    ]


def shapes(shape: tuple[int, ...], layout: Layout) -> list[Shape]:
    """The shapes (b, m, n) of the matrices of a parameter, one per block.

    Raises:
        ValueError: if the layout does not fit the parameter's shape.
    """
    kind, dim, outer, sizes = layout
    if kind not in KINDS:
        raise ValueError(f"a layout's kind must be one of {KINDS}, not {kind!r}")
    if len(shape) < 2 or (kind == "matrix" and len(shape) != 2):
        raise ValueError(f"a parameter of shape {shape} has no matrix of layout {kind!r}")
    if kind == "flatten":
        if sizes:
            raise ValueError("a flattened parameter cannot be fused: its layout must have sizes=()")
        return [(1, shape[0], math.prod(shape[1:]))]
    b, matrix = math.prod(shape[:-2]), (shape[-2], shape[-1])
    if not sizes:
        return [(b, *matrix)]
    if dim not in (0, 1) or outer < 1 or min(sizes) < 1 or outer * sum(sizes) != matrix[dim]:
        raise ValueError(
            f"{outer} times blocks of {sizes} are not the {matrix[min(max(dim, 0), 1)]} numbers "
            f"along dimension {dim} of a matrix {list(matrix)}"
        )
    lengths = [outer * size for size in sizes]
    return [(b, length, matrix[1]) if dim == 0 else (b, matrix[0], length) for length in lengths]
