"""A tensor read as a function of its indices: what is a leaf, and what a buffer is."""

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

from moonfx.capture.graph_nodes import BUFFER
from moonfx.passes.symbolic.expressions import is_boolean, loads, name_of
from moonfx.passes.symbolic.indices import BATCH, KEY, QUERY
from moonfx.passes.symbolic.input_masks import Given, mark
from moonfx.passes.symbolic.reader import Reader, summary
from tests.support.given_masks import HIDDEN, N, additive, causal
from tests.support.reading import plain_reader, returned, tensors_of, traced

LOWER = torch.ones(4, 4).tril()

SUMMARIES: list[tuple[str, Tensor, Any]] = [
    ("one value", torch.full((2, 3), 7.0), (7.0, 7.0)),
    ("a triangle", LOWER, (1.0, 0.0)),
    ("a triangle for each head", LOWER.expand(2, 3, 4, 4), (1.0, 0.0)),
    ("-inf above", torch.full((4, 4), -torch.inf).triu(1), (0.0, -torch.inf)),
    ("a triangle that is not square", torch.ones(3, 5).tril(), (1.0, 0.0)),
    ("a strict triangle", LOWER.tril(-1), None),
    ("three values", LOWER * 2 - LOWER.tril(-1), None),
    ("another triangle in one head", torch.stack([LOWER, LOWER.T]), None),
    ("a row", torch.tensor([1.0, 0.0]), None),
    ("NaN", torch.full((2, 2), torch.nan), None),
    ("nothing", torch.zeros(0), None),
    ("complex", torch.ones(2, dtype=torch.complex64), None),
]


@pytest.mark.parametrize(
    ("value", "expected"), [s[1:] for s in SUMMARIES], ids=[s[0] for s in SUMMARIES]
)
def test_a_buffer_is_one_value_or_a_triangle_or_not_known(value: Tensor, expected: Any) -> None:
    assert summary(value) == expected


def graph_of(value: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    gm = traced(lambda x: x.neg(), value)
    return gm, next(iter(gm.graph.nodes))


def test_a_buffer_that_is_read_is_noted_with_its_values() -> None:
    _, node = graph_of(LOWER)
    node.meta[BUFFER] = LOWER
    reader = plain_reader()
    assert reader.read(node, (QUERY, KEY)) == sympy.Piecewise((1, KEY <= QUERY), (0, True))
    assert reader.constants == {node: (1.0, 0.0)}


def test_an_input_is_a_leaf_whose_bools_are_truth_values() -> None:
    _, node = graph_of(torch.ones(3, dtype=torch.long))
    reader = plain_reader()
    value = reader.read(node, (KEY,))
    assert value.is_integer
    assert reader.leaf(value) is node
    gm = traced(lambda x: ~x, torch.ones(3, dtype=torch.bool))
    assert is_boolean(plain_reader().read(next(iter(gm.graph.nodes)), (KEY,)))
    assert plain_reader().read(graph_of(torch.ones(3))[1], (KEY,)).is_integer is None


def test_leaves_of_one_name_stay_apart() -> None:
    gm = traced(lambda x, y: x + y, torch.ones(3), torch.ones(3))
    reader = Reader(lambda node: None, lambda node: False, lambda node: "mask", tensors_of)
    x, y, *_ = gm.graph.nodes
    names = [name_of(reader.read(node, (KEY,))) for node in (x, y, x)]
    assert names == ["mask", "mask_", "mask"]
    assert reader.leaves == {"mask": x, "mask_": y}


def test_what_others_write_to_is_a_leaf_and_what_the_graph_made_is_read() -> None:
    gm = traced(lambda x: x.add_(1) * 2, torch.arange(4))
    given, written = next(iter(gm.graph.nodes)), returned(gm).args[0]
    reader = Reader(lambda n: None, lambda n: n in (given, written), lambda n: n.name, tensors_of)
    assert loads(reader.read(returned(gm), (KEY,)))
    made = returned(traced(lambda: torch.arange(4).add_(1) * 2))
    writes = (made.args[0], made.args[0].args[0])
    reader = Reader(lambda n: None, lambda n: n in writes, lambda n: n.name, tensors_of)
    assert reader.read(made, (KEY,)) == 2 * KEY + 2


def test_an_input_of_a_body_is_what_the_body_is_called_with() -> None:
    outside = returned(traced(lambda: torch.arange(4)))
    gm, inside = graph_of(torch.arange(4))
    reader = Reader({inside: outside}.get, lambda n: False, lambda n: n.name, tensors_of)
    assert reader.read(returned(gm), (KEY,)) == -KEY
    assert reader.leaves == {}


def test_a_size_is_its_symbol_for_every_shape() -> None:
    gm = traced(lambda x: torch.arange(x.shape[0]) + x.shape[0], torch.ones(5), dynamic=True)
    size = next(iter(gm.graph.nodes)).meta["val"].shape[0].node.expr
    assert plain_reader().read(returned(gm), (KEY,)) == KEY + size


def test_a_broadcast_dim_is_read_at_its_only_index() -> None:
    _, node = graph_of(torch.ones(2, 1, 5))
    value = plain_reader().broadcast(node, (BATCH, QUERY, KEY))
    assert value.args == (BATCH, 0, KEY)
    assert plain_reader().broadcast(node, (sympy.Symbol("h"), BATCH, QUERY, KEY)).args == value.args


def test_a_mask_of_rows_and_keys_is_not_taken_for_one_of_queries_and_keys() -> None:
    """Padding on the right, of as many rows as real keys, looks causal."""
    gm, node = graph_of(additive(causal(8, N)))
    mark(gm, [additive(causal(8, N))])
    reader = plain_reader()
    by_query = reader.read(node, (QUERY, KEY))
    assert reader.constants == {node: Given(0.0, HIDDEN)}
    assert by_query.has(KEY, QUERY)
    reader = plain_reader()
    reader.read(node, (BATCH, KEY))
    assert reader.constants == {}
    assert list(reader.leaves.values()) == [node]
