"""A walk comes to all that a node is made of, or that is made of it, up to where it stops."""

import operator

from torch import fx

from moonfx.passes.graph.walks import downstream, reachable, upstream


def diamond() -> tuple[fx.Node, ...]:
    """x -> left, right -> joined -> out, where out also reads x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    left = graph.call_function(operator.neg, (x,))
    right = graph.call_function(operator.pos, (x,))
    joined = graph.call_function(operator.add, (left, right))
    out = graph.call_function(operator.mul, (joined, x))
    return x, left, right, joined, out


def test_a_walk_comes_to_all_that_a_node_is_made_of_or_that_is_made_of_it() -> None:
    x, left, right, joined, out = diamond()
    assert upstream([joined]) == {joined, left, right, x}
    assert downstream([left]) == {left, joined, out}
    assert upstream([]) == downstream([]) == set()


def test_where_a_walk_stops_is_left_out_and_what_only_lies_past_it() -> None:
    x, left, right, joined, out = diamond()
    assert upstream([joined], stop=lambda n: n is left) == {joined, right, x}
    assert upstream([joined], stop=lambda n: n in (left, right)) == {joined}
    assert downstream([x], stop=lambda n: n is joined) == {x, left, right, out}


def test_a_walk_around_a_circle_ends() -> None:
    assert reachable([0], lambda n: [(n + 1) % 3]) == {0, 1, 2}
    assert reachable([0, 4], lambda n: [n + 1], stop=lambda n: n > 2) == {0, 1, 2}
