"""Tensors made empty and then filled: what became of their features, or that it is not known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moonfx.passes.context import Context
from moonfx.passes.masks.filled import filled_with
from moonfx.policy import LayerPolicy
from tests.support.reading import traced

B, N, C = 2, 4, 6
Fill = Callable[[Tensor, Tensor, Tensor], object]


def two_slices(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made[..., :4].copy_(x[..., :4])
    made[..., 4:] = y[..., :2]
    return made + 1


def slice_of_a_slice(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made[:, :, 2:][..., 2:].copy_(x[..., :2])
    return made + 1


def tokens(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made[:, :2].copy_(x[:, :2])
    made[:, 2:].copy_(y[:, 2:])
    return made + 1


def tokens_of_a_copy(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made.copy_(x)[:, :2].copy_(y[:, :2])
    return made + 1


def rows_turned(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made.transpose(0, 1)[..., :4].copy_(x.transpose(0, 1)[..., :4])
    return made + 1


def added_to(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
    made.copy_(x)
    return made.add_(y) + 1


def read_in_between(made: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    made[..., :4].copy_(x[..., :4])
    early = made + 1
    made[..., 4:].copy_(y[..., 4:])
    return early, made + 1


def view_read_in_between(made: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    view = made.view(B, N, 2, 3)
    made[..., :4].copy_(x[..., :4])
    early = view + 1
    made[..., 4:].copy_(y[..., 4:])
    return early, made + 1


def found(fill: Fill, make: Callable[[Tensor], Tensor] = Tensor.new_empty) -> list[fx.Node]:
    def run(x: Tensor, y: Tensor) -> object:
        return fill(x.new_empty(B, N, C) if make is Tensor.new_empty else make(x), x, y)

    gm = traced(run, torch.ones(B, N, C), torch.ones(B, N, C))
    made = next(n for n in gm.graph.nodes if n.op == "call_function")
    return filled_with(made, Context(gm, lambda *given: LayerPolicy()))


def inputs_of(nodes: list[fx.Node]) -> set[str]:
    """The names of the inputs that nodes are slices of."""
    names = set()
    for node in nodes:
        while node.op != "placeholder":
            node = node.all_input_nodes[0]
        names.add(node.name[0])
    return names


@pytest.mark.parametrize("make", [Tensor.new_empty, torch.empty_like, torch.zeros_like])
def test_what_is_copied_into_slices_of_features_is_found(
    make: Callable[[Tensor], Tensor],
) -> None:
    parts = found(two_slices, make)
    assert (len(parts), inputs_of(parts)) == (2, {"x", "y"})


def test_a_slice_of_a_slice_is_found() -> None:
    assert inputs_of(found(slice_of_a_slice)) == {"x"}


@pytest.mark.parametrize("fill", [tokens, tokens_of_a_copy, rows_turned])
def test_what_is_copied_into_some_tokens_is_of_no_parts(fill: Fill) -> None:
    assert found(fill) == []


@pytest.mark.parametrize("fill", [read_in_between, view_read_in_between])
def test_what_is_read_before_it_is_full_is_of_no_parts(fill: Fill) -> None:
    assert found(fill) == []


def test_other_writes_are_of_no_parts() -> None:
    assert found(added_to) == []


def test_values_that_it_was_made_with_are_of_no_parts() -> None:
    assert found(two_slices, torch.ones_like) == []
    assert found(two_slices, Tensor.clone) == []


def test_what_is_never_written_to_is_of_no_parts() -> None:
    assert found(lambda made, x, y: made + x) == []
