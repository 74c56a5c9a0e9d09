"""A walk gives each node once, and nothing beyond where it stops."""

import operator

from torch import fx

from moonfx.passes.graph.walks import upstream


def diamond() -> tuple[fx.Node, ...]:
    """x -> left, right -> joined -> out, where out also reads x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    left = graph.call_function(operator.neg, (x,))
    right = graph.call_function(operator.pos, (x,))
    joined = graph.call_function(operator.add, (left, right))
    out = graph.call_function(operator.mul, (joined, x))
    return x, left, right, joined, out


def test_a_walk_gives_each_node_once_and_its_start_first() -> None:
    x, left, right, joined, out = diamond()
    found = list(upstream([out]))
    assert found[0] is out
    assert len(found) == 5
    assert set(found) == {x, left, right, joined, out}


def test_where_a_walk_stops_is_given_and_not_what_it_reads() -> None:
    x, left, right, joined, _ = diamond()
    assert set(upstream([joined], stop=lambda n: n is left)) == {joined, left, right, x}
    assert set(upstream([joined], stop=lambda n: n in (left, right))) == {joined, left, right}


def test_a_circle_is_walked_once_and_what_is_given_twice_too() -> None:
    assert list(upstream([0], inputs=lambda n: [(n + 1) % 3])) == [0, 1, 2]
    assert list(upstream([1, 1, 2], inputs=lambda n: [])) == [2, 1]
    assert list(upstream([], inputs=lambda n: [n])) == []
