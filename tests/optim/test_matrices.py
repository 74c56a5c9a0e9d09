"""Where the matrices lie in a parameter: exact, against index arithmetic in plain words."""

import pytest
import torch
from torch import Tensor

from moonfx.optim.matrices import Layout, pieces, shapes


def number(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def rows(x: Tensor, *wanted: int) -> Tensor:
    return x[list(wanted)]


# Name, parameter, layout, the matrices in it.
CASES = [
    ("a matrix", number(3, 5), Layout(), lambda x: [x[None]]),
    ("a convolution", number(4, 2, 3, 3), Layout("flatten"), lambda x: [x.reshape(1, 4, 18)]),
    ("a convolution in 1D", number(4, 2, 3), Layout("flatten"), lambda x: [x.reshape(1, 4, 6)]),
    (
        "a convolution, channels last",
        number(4, 2, 3, 3).to(memory_format=torch.channels_last),
        Layout("flatten"),
        lambda x: [x.reshape(1, 4, 18)],
    ),
    (
        "a convolution of two groups",
        number(4, 2, 3, 3),
        Layout("flatten", outer=2),
        lambda x: [x.reshape(2, 2, 18)],
    ),
    ("experts", number(2, 3, 5), Layout("batch"), lambda x: [x]),
    ("experts in the middle", number(3, 2, 5), Layout("middle"), lambda x: [x.transpose(0, 1)]),
    ("experts last", number(3, 5, 2), Layout("last"), lambda x: [x.permute(2, 0, 1)]),
    (
        "gate and up of experts in the middle",
        number(4, 2, 5),
        Layout("middle", sizes=(2, 2)),
        lambda x: [x.transpose(0, 1)[:, :2], x.transpose(0, 1)[:, 2:]],
    ),
    ("experts of groups", number(2, 2, 3, 5), Layout("batch"), lambda x: [x.reshape(4, 3, 5)]),
    (
        "query, key and value",
        number(8, 5),
        Layout(sizes=(4, 2, 2)),
        lambda x: [x[None, :4], x[None, 4:6], x[None, 6:]],
    ),
    (
        "query, key and value of each head beside each other",
        number(12, 5),
        Layout(outer=2, sizes=(2, 1, 3)),
        lambda x: [
            rows(x, 0, 1, 6, 7)[None],
            rows(x, 2, 8)[None],
            rows(x, 3, 4, 5, 9, 10, 11)[None],
        ],
    ),
    (
        "blocks of columns",
        number(3, 6),
        Layout(dim=1, sizes=(2, 4)),
        lambda x: [x[None, :, :2], x[None, :, 2:]],
    ),
    (
        "repeated blocks of columns",
        number(3, 6),
        Layout(dim=1, outer=2, sizes=(1, 2)),
        lambda x: [x[None][..., [0, 3]], x[None][..., [1, 2, 4, 5]]],
    ),
    (
        "gate and up of experts",
        number(2, 4, 5),
        Layout("batch", sizes=(2, 2)),
        lambda x: [x[:, :2], x[:, 2:]],
    ),
    (
        "gate and up of experts, interleaved columns",
        number(2, 3, 4),
        Layout("batch", 1, 2, (1, 1)),
        lambda x: [x[..., 0::2], x[..., 1::2]],
    ),
]


@pytest.mark.parametrize(
    ("parameter", "layout", "matrices"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_pieces_are_views_that_hold_the_matrices_row_by_row(parameter, layout, matrices) -> None:
    expected = matrices(parameter)
    found = pieces(parameter, layout)
    assert [piece.shape for piece in found] == [tuple(x.shape) for x in expected]
    assert [piece.shape for piece in found] == shapes(tuple(parameter.shape), layout)
    for piece, matrix in zip(found, expected, strict=True):
        assert piece.view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        slot = torch.empty(piece.shape)
        slot.view(piece.view.shape).copy_(piece.view)
        assert torch.equal(slot, matrix)


def test_every_number_of_a_parameter_is_in_exactly_one_matrix() -> None:
    for _, parameter, layout, _ in CASES:
        copy = parameter.clone()
        for piece in pieces(copy, layout):
            piece.view.add_(1)
        assert torch.equal(copy, parameter + 1)


MISFITS = [
    ("a vector", (5,), Layout(), "has no matrix"),
    ("three dimensions", (2, 3, 5), Layout(), "has no matrix"),
    ("another kind", (3, 5), Layout("rows"), "kind must be one of"),
    ("blocks that leave rows", (8, 5), Layout(sizes=(4, 2)), "are not the 8 numbers"),
    ("blocks of other columns", (8, 5), Layout(dim=1, sizes=(4, 4)), "are not the 5 numbers"),
    ("a third dimension", (8, 5), Layout(dim=2, sizes=(4, 4)), "along dimension 2"),
    ("an empty block", (8, 5), Layout(sizes=(8, 0)), "are not the 8 numbers"),
    ("no repetition", (8, 5), Layout(outer=0, sizes=(8,)), "are not the 8 numbers"),
    ("groups of unequal rows", (8, 5, 3), Layout("flatten", outer=3), "8 rows are not 3 matrices"),
    ("a fused convolution", (8, 5, 3), Layout("flatten", sizes=(4, 4)), "cannot be fused"),
]


@pytest.mark.parametrize(
    ("shape", "layout", "says"), [c[1:] for c in MISFITS], ids=[c[0] for c in MISFITS]
)
def test_a_layout_that_does_not_fit_is_named(shape, layout, says) -> None:
    with pytest.raises(ValueError, match=says):
        shapes(shape, layout)
    with pytest.raises(ValueError, match=says):
        pieces(torch.zeros(shape), layout)
