"""What reads pixels is one role, as a convolution or as a linear map of patches.

Each row: the form, the model, what to call it with, and the role of each parameter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.optim.uses import HIDDEN, Use, normed, rows

IMAGES = torch.randn(2, 3, 4, 4)


def patches(x: Tensor) -> Tensor:
    return (
        x.unflatten(2, (2, 2))
        .unflatten(4, (2, 2))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
    )


PIXELS = [
    # name, forward, shapes, what to call it with, roles
    (
        "patches cut by hand",
        lambda m, x: normed(F.linear(patches(x), m.a)),
        {"a": (6, 12)},
        IMAGES,
        "patch embedding",
    ),
    (
        "the same, by a convolution",
        lambda m, x: normed(F.conv2d(x, m.a, stride=2).flatten(2).transpose(1, 2)),
        {"a": (6, 3, 2, 2)},
        IMAGES,
        "first convolution",
    ),
    (
        "the same, by unfold, of what was scaled",
        lambda m, x: normed(F.linear(F.unfold((x - 0.5) / 0.2, 2, stride=2).mT, m.a)),
        {"a": (6, 12)},
        IMAGES,
        "patch embedding",
    ),
    (
        "a flattened image",
        lambda m, x: normed(F.linear(x.flatten(1), m.a)),
        {"a": (6, 48)},
        IMAGES,
        "patch embedding",
    ),
    (
        "patches of activations are none",
        lambda m, x: normed(F.linear(patches(x * m.b), m.a)),
        {"a": (6, 12), "b": (4,)},
        IMAGES,
        {"a": HIDDEN, "b": "vector"},
    ),
    (
        "the last of four dims is features",
        lambda m, x: normed(F.linear(x, m.a)),
        {"a": (6, 4)},
        IMAGES,
        HIDDEN,
    ),
]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in PIXELS], ids=[r[0] for r in PIXELS]
)
def test_a_map_of_patches_is_told_by_what_it_reads_and_not_by_its_spelling(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    found = rows(Use(forward, **shapes), given)
    expected = {"a": expected} if isinstance(expected, str) else expected
    assert {name: row.role for name, row in found.items()} == expected


def test_patches_that_are_given_are_known_by_their_name() -> None:
    """As NaFlex models take them: cut before the call."""

    class Given(Use):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return normed(F.linear(pixel_values, self.a))

    class Features(Use):
        def forward(self, image_features: Tensor) -> Tensor:
            return normed(F.linear(image_features, self.a))

    x = torch.randn(2, 4, 12)
    assert rows(Given(normed, a=(6, 12)), x)["a"].role == "patch embedding"
    assert rows(Features(normed, a=(6, 12)), x)["a"].role == HIDDEN
