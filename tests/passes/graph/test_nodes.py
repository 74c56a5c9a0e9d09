"""Reading one node, and writing one."""

from typing import Any

import pytest
import torch
from torch import fx

import moonfx  # noqa: F401  registers the operators
from moonfx.passes.graph.nodes import arguments_of, insert, insert_with_meta, origin

aten = torch.ops.aten
NEWTON_SCHULZ = torch.ops.moonfx.newton_schulz.default

# An operator, its arguments as they are written, and by the schema's names.
CALLS: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
    (
        "by position",
        aten.transpose.int,
        ("x", 0, 1),
        {},
        {"self": "x", "dim0": 0, "dim1": 1},
    ),
    (
        "by name",
        aten.transpose.int,
        ("x",),
        {"dim1": 1, "dim0": 0},
        {"self": "x", "dim0": 0, "dim1": 1},
    ),
    ("a default", aten.add.Tensor, ("x", "y"), {}, {"self": "x", "other": "y", "alpha": 1}),
    (
        "by name only",
        aten.add.Tensor,
        ("x", "y"),
        {"alpha": 2},
        {"self": "x", "other": "y", "alpha": 2},
    ),
    (
        "moonfx's own",
        NEWTON_SCHULZ,
        ("x", [3.0, -4.0, 2.0]),
        {},
        {"X": "x", "coefficients": [3.0, -4.0, 2.0], "form": "auto"},
    ),
]


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)
def test_arguments_are_read_by_the_names_in_the_schema(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert arguments_of(fx.Graph().call_function(target, args, kwargs)) == expected


def _graph() -> tuple[fx.Node, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(val=torch.zeros(2, 3), stack_trace="of x", moonfx_trained=True)
    y = graph.call_function(aten.neg.default, (x,))
    y.meta.update(val=torch.zeros(2, 3), stack_trace="of y")
    return x, y


def test_what_is_inserted_stands_before_a_node_and_has_its_value_and_source_line() -> None:
    x, y = _graph()
    node = insert(aten.transpose.int, (x, 0, 1), y)
    assert list(x.graph.nodes) == [x, node, y]
    assert (node.meta["val"].shape, node.stack_trace) == ((3, 2), "of y")
    assert insert(aten.neg.default, (x,), y, like=x).stack_trace == "of x"
    assert "moonfx_trained" not in insert(aten.neg.default, (x,), y, like=x).meta
    assert origin(node) is x


def test_a_value_that_is_given_is_not_computed() -> None:
    x, y = _graph()
    value = torch.ones(2, 3)

    def fails(*args: Any) -> None:
        raise AssertionError("it was run")

    assert insert(fails, (x,), y, value=value).meta["val"] is value


def test_a_node_may_be_given_another_s_meta_whole() -> None:
    x, y = _graph()
    node = insert_with_meta(aten.add.Tensor, (x, x), y, x.meta, {"alpha": 2})
    assert node.meta == x.meta
    assert node.meta is not x.meta
    assert node.kwargs == {"alpha": 2}
