"""What a captured graph says of its nodes: inputs, buffers, bodies, module, source line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moonfx.capture.graph_nodes import (
    BUFFER,
    CAPTURED,
    INPUT,
    TRAINED,
    body_position,
    buffer_value,
    graph_root,
    input_name,
    is_composite,
    may_be_trained,
    module_path,
    name_invoked_bodies,
    nested_graphs,
    opaque_body,
    placeholders,
    source_line,
)
from tests.support.bodies import OPERATORS, nested
from tests.support.reading import traced

aten = torch.ops.aten
X, Y = torch.ones(3), torch.ones(3)


def node(meta: dict[str, Any] | None = None, trace: str = "") -> Any:
    return SimpleNamespace(meta=meta or {}, stack_trace=trace)


LINES = [
    ("nothing", "", "unknown"),
    ("one frame", '  File "/a/model.py", line 12, in forward\n    x', "model.py:12"),
    (
        "the innermost of several",
        '  File "/a/model.py", line 12, in forward\n    x\n  File "/a/attn.py", line 3, in f\n',
        "attn.py:3",
    ),
    ("a graph's own code", '  File "<eval_with_key>.5", line 7, in forward', "graph line 7"),
    (
        "a graph's own code that says where it is from",
        '  File "<eval_with_key>.5 from /a/model.py:3 in f", line 7, in forward',
        "model.py:3, graph line 7",
    ),
]


@pytest.mark.parametrize(("trace", "expected"), [x[1:] for x in LINES], ids=[x[0] for x in LINES])
def test_a_line_is_the_users_innermost(trace: str, expected: str) -> None:
    assert source_line(node(trace=trace)) == expected


def test_a_module_goes_by_the_models_name_for_it() -> None:
    stack = {"1": ("L['self']", object), "7": ("L['self'].layers.0", object)}
    inside = node({"nn_module_stack": stack})
    assert module_path(inside, {7: "decoder.layers.3"}, "") == "decoder.layers.3"
    assert module_path(inside, {}, "") == "layers.0"
    assert module_path(inside, {}, "decoder") == "decoder.layers.0"
    assert module_path(node(), {}, "decoder") == "decoder"
    assert module_path(node(), {}, None) == ""
    called = node({"nn_module_stack": {"7@2": ("L['self'].layers.0", object)}})
    assert module_path(called, {7: "shared"}, "") == "shared", "called a second time"


def placeholder(**meta: Any) -> fx.Node:
    made = fx.Graph().placeholder("x")
    made.meta.update(meta)
    return made


SOURCES = [
    ("L['self']._modules['norm']._parameters['weight']", (True, "norm.weight")),
    ("L['self']._buffers['mask']", (True, "mask")),
    ("L['mask']", (False, "mask")),
    ("L['kwargs']['mask']", (False, "mask")),
    ("", None),
]


@pytest.mark.parametrize(("source", "expected"), SOURCES)
def test_an_input_is_named_as_dynamo_found_it(source: str, expected: Any) -> None:
    given = SimpleNamespace(source=SimpleNamespace(name=source))
    assert input_name(placeholder(grapharg=given)) == expected
    called = SimpleNamespace(source=SimpleNamespace(name=lambda: source))
    assert input_name(placeholder(grapharg=called)) == expected


def test_a_name_that_is_given_counts_and_no_other_node_has_one() -> None:
    assert input_name(placeholder(**{INPUT: (True, "a.b")})) == (True, "a.b")
    assert input_name(placeholder().graph.get_attr("x")) is None


def test_a_buffers_value_is_read_from_what_holds_it() -> None:
    assert buffer_value(placeholder(**{BUFFER: X})) is X
    assert buffer_value(placeholder()) is None
    gm = fx.GraphModule({}, fx.Graph())
    gm.held, gm.inner = X, nn.Linear(2, 2)
    assert buffer_value(gm.graph.get_attr("held")) is X
    assert buffer_value(gm.graph.get_attr("inner")) is None


def test_an_input_may_be_trained_unless_it_is_a_buffer_or_known_not_to_be() -> None:
    assert may_be_trained(placeholder())
    assert not may_be_trained(placeholder(**{BUFFER: X}))
    assert not may_be_trained(placeholder(**{TRAINED: False}))
    assert may_be_trained(placeholder(**{BUFFER: X, TRAINED: True}))
    assert not may_be_trained(placeholder().graph.call_function(aten.neg.default, ()))


@pytest.mark.parametrize("by", list(OPERATORS))
def test_a_body_and_its_operands_are_found_among_the_arguments(by: str) -> None:
    gm, call, body = nested(lambda x, y: x * y, X, Y, by=by)
    at, first = body_position(call)
    assert call.args[at].target == "body"
    assert list(call.args[first:]) == placeholders(gm.graph)
    assert list(nested_graphs(gm)) == [gm, body]
    body.meta[CAPTURED] = False
    assert list(nested_graphs(gm)) == [gm]
    assert opaque_body(call.args[at]) is body


def test_an_operator_that_the_passes_do_not_look_into_has_no_body() -> None:
    cond = torch.ops.higher_order.cond
    x = placeholder()
    assert body_position(x.graph.call_function(cond, (x, x, x, (x,)))) is None
    assert body_position(x.graph.call_function(aten.neg.default, (x,))) is None
    assert opaque_body(x) is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.matmul.default, True),
        (aten.reshape.default, True),
        (aten.mm.default, False),
        (aten.view.default, False),
        (torch.matmul, False),
    ],
)
def test_an_operator_that_is_made_of_others_is_known(target: Any, expected: bool) -> None:
    assert is_composite(target) is expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("L['self']._modules['layers']._modules['1']._parameters['weight']", ""),
        ("L['self']._modules['1']._parameters['weight']", "layers"),
        ("L['self']._parameters['weight']", "layers.1"),
        ("L['self']._parameters['bias']", None),
        ("L['self']._modules['0']._parameters['weight']", None),
        ("", None),
    ],
)
def test_a_graph_starts_in_the_module_whose_parameters_have_the_rest_of_the_name(
    source: str, expected: str | None
) -> None:
    weight = nn.Parameter(torch.ones(2))
    gm = fx.GraphModule({}, fx.Graph())
    node = gm.graph.placeholder("weight")
    node._dynamo_source = SimpleNamespace(name=source)  # type: ignore[attr-defined]
    assert graph_root(gm, [weight], {id(weight): "layers.1.weight"}) == expected
    assert graph_root(gm, [X], {id(weight): "layers.1.weight"}) is None


def two_regions(second: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Two calls of regions of one name, of which the second may hold something else."""
    gm, first, _ = nested(lambda x, y: x * y, X, Y)
    gm.add_submodule("other", traced(second, X, Y))
    gm.other.meta[CAPTURED] = True
    with gm.graph.inserting_before(first):
        held = gm.graph.get_attr("other")
        call = gm.graph.call_function(first.target, (held, *first.args[1:]))
    return gm, [first, call]


def test_regions_share_a_name_only_where_they_hold_the_same() -> None:
    def other(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    gm, (first, second) = two_regions(lambda x, y: x * y)
    name_invoked_bodies(gm, retraced=False)
    assert first.args[1] == second.args[1]
    gm, (first, second) = two_regions(other)
    name_invoked_bodies(gm, retraced=False)
    assert first.args[1] != second.args[1]
