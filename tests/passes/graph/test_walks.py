"""Each node of a walk once, these beyond what stops it not at all."""

import operator

from torch import fx

from moonfx.passes.graph.walks import downstream, reachable, upstream


def diamond() -> tuple[fx.Node, ...]:
    """x -> left, right -> out, with out also reading x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    left = graph.call_function(operator.neg, (x,))
    right = graph.call_function(operator.pos, (x,))
    joined = graph.call_function(operator.add, (left, right))
    out = graph.call_function(operator.mul, (joined, x))
    return x, left, right, joined, out


def test_a_walk_gives_each_node_once_and_its_start_first() -> None:
    x, left, right, joined, out = diamond()
    for walk, start in ((upstream(out), out), (downstream(x), x)):
        found = list(walk)
        assert found[0] is start
        assert len(found) == 5
        assert set(found) == {x, left, right, joined, out}


def test_a_walk_goes_no_further_than_through_says_and_gives_where_it_stopped() -> None:
    x, left, right, joined, _ = diamond()
    assert set(upstream(joined, through=lambda n: n is not left)) == {joined, left, right, x}
    assert set(upstream(joined, through=lambda n: n is joined)) == {joined, left, right}
    assert set(downstream(left, through=lambda n: n is not joined)) == {left, joined}


def test_a_circle_is_walked_once() -> None:
    assert list(reachable([0], lambda n: [(n + 1) % 3])) == [0, 1, 2]
    assert list(reachable([1, 1, 2], lambda n: [])) == [2, 1]
