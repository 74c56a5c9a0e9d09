"""Which axes of a call are batch and tokens, and the same call at another size."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from moonfx.onnx import sizes

TOKENS = torch.arange(12).view(2, 6)

# Name, shape of a tensor in a call of 2 rows of 6 tokens, and its axes.
AXES: list[tuple[str, tuple[int, ...], dict[int, str]]] = [
    ("tokens", (2, 6), {0: "batch", 1: "sequence"}),
    ("embeddings", (2, 6, 8), {0: "batch", 1: "sequence"}),
    ("positions", (6,), {0: "sequence"}),
    ("a row's number", (2,), {}),
    ("a mask", (2, 1, 6, 6), {0: "batch", 2: "sequence", 3: "sequence"}),
    ("a mask of as many heads as tokens", (2, 6, 6, 6), {0: "batch", 2: "sequence", 3: "sequence"}),
    ("keys of a cache", (2, 4, 6, 8), {0: "batch", 2: "sequence"}),
    ("a mask of all rows", (1, 1, 6, 6), {2: "sequence", 3: "sequence"}),
    ("a table", (7, 8), {}),
    ("a number", (), {}),
]


@pytest.mark.parametrize(("shape", "axes"), [a[1:] for a in AXES], ids=[a[0] for a in AXES])
def test_axes_are_known_by_their_sizes(shape: tuple[int, ...], axes: dict[int, str]) -> None:
    assert sizes.axes_of(torch.zeros(shape), 2, 6) == axes


def test_the_first_tensor_of_two_axes_says_how_long_a_call_is() -> None:
    assert sizes.token_input(({"p": torch.arange(6)}, TOKENS, torch.zeros(3, 4))) is TOKENS
    with pytest.raises(ValueError, match="got none of two or more axes"):
        sizes.token_input((torch.arange(6), 3))


def test_a_call_of_one_row_and_one_token_is_made_large_enough_to_be_traced() -> None:
    (words, place), named = sizes.large_enough(
        ((torch.tensor([[5]]), torch.tensor([3])), {"mask": torch.ones(1, 1, 1, 1), "flag": True})
    )
    assert words.tolist() == [[5, 5], [5, 5]]
    assert place.tolist() == [3, 3]
    assert (named["mask"].shape, named["flag"]) == ((2, 1, 2, 2), True)
    call = ((TOKENS,), {})
    assert sizes.large_enough(call)[0][0] is TOKENS


def test_another_size_repeats_or_cuts_the_entries() -> None:
    assert sizes.repeated(TOKENS, 1, 8)[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert sizes.repeated(TOKENS, 0, 1).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert sizes.repeated(TOKENS, 1, 6) is TOKENS


class Scaled(nn.Module):
    def forward(self, words: Tensor, places: Tensor, scale: float = 1.0) -> Tensor:
        return (words * places)[..., None] * scale


def test_arguments_are_named_as_the_forward_has_them() -> None:
    model, places = Scaled(), torch.arange(6)
    assert sizes.by_name(model, (TOKENS,), {"places": places}) == {
        "words": TOKENS,
        "places": places,
    }
    assert sizes.parameters(model) == ["words", "places", "scale"]
    with pytest.raises(TypeError, match="args and kwargs do not fit Scaled.forward: missing"):
        sizes.by_name(model, (TOKENS,), {})
    dims = {"batch": Dim.DYNAMIC, "sequence": Dim.AUTO}
    found = sizes.dynamic_shapes({"words": TOKENS, "places": places, "scale": 2.0}, dims)
    assert found == {"words": {0: Dim.DYNAMIC, 1: Dim.AUTO}, "places": {0: Dim.AUTO}, "scale": None}


def inputs_of(dynamic: Any = True, from_one: bool = False) -> sizes.Inputs:
    call: Any = ((TOKENS, torch.arange(6)), {})
    return sizes.Inputs(sizes.exported(Scaled(), call, dynamic), call, from_one)


def test_a_dynamic_program_is_checked_as_traced_at_a_third_at_twice_and_at_one() -> None:
    assert inputs_of(from_one=True).sizes() == [(2, 6), (1, 2), (3, 20), (1, 1)]
    assert inputs_of(dynamic=False).sizes() == [(2, 6)]


def test_sizes_stay_within_the_programs_range() -> None:
    words = Dim("words", min=4, max=10)
    narrow = inputs_of(({0: None, 1: words}, {0: words}))
    assert narrow.limit("sequence") == (4, 10)
    assert narrow.sizes() == [(2, 6), (2, 4), (2, 10)]


def test_inputs_at_another_size_keep_their_entries_and_their_rows_differ() -> None:
    inputs = inputs_of(from_one=True)
    words, places = inputs.at(3, 4)
    assert places.tolist() == [0, 1, 2, 3]
    assert words.shape == (3, 4)
    assert sorted(words[0].tolist()) == [0, 1, 2, 3]
    assert words[2].tolist() != words[0].tolist()  # a repeated row, shifted
    (args, kwargs) = inputs.unflatten([words, places])
    assert (args[0] is words, kwargs) == (True, {})


class UpToEight(nn.Module):
    """A table of positions bounds the length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        torch._check(words.shape[1] <= 8)
        return words[..., None] + self.table.weight[: words.shape[1]]


def test_a_range_that_the_model_has_is_found() -> None:
    program = sizes.exported(UpToEight(), ((TOKENS,), {}), True)
    assert sizes.Inputs(program, ((TOKENS,), {}), True).limit("sequence")[1] == 8


class OfSix(nn.Module):
    def forward(self, words: Tensor) -> Tensor:
        return words + torch.arange(6)


def test_a_length_that_the_model_fixes_is_an_error_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match="OfSix can be exported for sequence 6 only: pass dynamic=False"
    ):
        sizes.exported(OfSix(), ((TOKENS,), {}), True)
