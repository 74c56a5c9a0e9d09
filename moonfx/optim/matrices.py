"""Where the matrices lie in a parameter.

    [m, n]                        one matrix, a Linear's weight
    [m, k, h, w]                  one matrix [m, k h w], a convolution's filters
    [g m, k, h, w]                g matrices [m, k h w], a group each of a convolution's filters
    [e, m, n]                     e matrices, an expert each; also as [m, e, n] and [m, n, e]
    [q + k + v, n]                three matrices, each a block of rows of one fused projection
    [heads * (q + k + v), n]      the same with the blocks of each head beside each other

A piece is a view of the parameter, or of a tensor of its shape, in which the numbers of `b`
matrices [m, n] follow each other row by row. So it goes straight into and out of a contiguous
[b, m, n] that is viewed in the piece's own shape.
"""

import math
from typing import NamedTuple

from torch import Tensor

# The dims of the matrices of a kind that has several beside each other.
BATCHED = {"batch": (-2, -1), "middle": (0, -1), "last": (0, 1)}
KINDS = ("matrix", "flatten", *BATCHED)
Shape = tuple[int, int, int]


class Layout(NamedTuple):
    """Where the matrices lie in a parameter.

    Attributes:
        kind: "matrix" [m, n], "flatten" [m, ...] as [m, n], or several matrices: "batch"
            [..., m, n], "middle" [m, ..., n], "last" [m, n, ...].
        dim: of a fused parameter, the dimension of the matrix along which its blocks lie: 0 for
            rows (of a Linear), 1 for columns (of Hugging Face's Conv1D).
        outer: how often the pattern of blocks repeats along `dim`; of a flattened parameter, how
            many matrices lie under each other.
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
    tensor = matrices_last(tensor, layout)
    if not layout.sizes:
        return [Piece(tensor, found[0])]
    dim = tensor.ndim - 2 + layout.dim
    if layout.outer > 1:
        tensor = tensor.unflatten(dim, (layout.outer, sum(layout.sizes)))
        dim += 1
    return [Piece(*x) for x in zip(tensor.split(layout.sizes, dim), found, strict=True)]


def matrices_last(tensor: Tensor, layout: Layout) -> Tensor:
    """A view of a tensor that has its matrices in its last two dims, unless it is flattened."""
    if layout.kind not in BATCHED:
        return tensor
    return tensor.movedim(BATCHED[layout.kind], (-2, -1))


def matrices_back(view: Tensor, layout: Layout) -> Tensor:
    """What `matrices_last` made a view of, or a tensor of its shape, in the parameter's own."""
    if layout.kind not in BATCHED:
        return view
    return view.movedim((-2, -1), BATCHED[layout.kind])


def single(tensor: Tensor, layout: Layout) -> list[list[Tensor]]:
    """The matrices of a contiguous tensor one by one, in a list for each of its `pieces`."""
    if layout.kind == "flatten":
        return [list(tensor.view(layout.outer, -1, *tensor.shape[1:]).unbind())]
    views = [piece.view for piece in pieces(tensor, layout)]
    if layout.kind == "matrix" or tensor.ndim == 2:
        return [[view] for view in views]
    return [list(view.flatten(0, tensor.ndim - 3).unbind()) for view in views]


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
        if outer < 1 or shape[0] % outer:
            raise ValueError(f"{shape[0]} rows are not {outer} matrices under each other")
        return [(outer, shape[0] // outer, math.prod(shape[1:]))]
    rows, columns = BATCHED.get(kind, (0, 1))
    matrix = (shape[rows], shape[columns])
    own = (rows % len(shape), columns % len(shape))
    b = math.prod([size for i, size in enumerate(shape) if i not in own])
    if not sizes:
        return [(b, *matrix)]
    if dim not in (0, 1) or outer < 1 or min(sizes) < 1 or outer * sum(sizes) != matrix[dim]:
        raise ValueError(
            f"{outer} times blocks of {sizes} are not the {matrix[min(max(dim, 0), 1)]} numbers "
            f"along dimension {dim} of a matrix {list(matrix)}"
        )
    lengths = [outer * size for size in sizes]
    return [(b, length, matrix[1]) if dim == 0 else (b, matrix[0], length) for length in lengths]
