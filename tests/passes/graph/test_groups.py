"""Groups are the connected parts of what was joined, in whatever order it was."""

from hypothesis import given
from hypothesis import strategies as st

from moonfx.passes.graph.groups import Groups
from moonfx.passes.graph.walks import reachable

MEMBER = st.integers(0, 9)


@given(st.lists(st.tuples(MEMBER, MEMBER), max_size=12))
def test_two_members_share_a_representative_where_joins_connect_them(
    joins: list[tuple[int, int]],
) -> None:
    groups = Groups[int]()
    for a, b in joins:
        groups.join(a, b)
    near = {n: [b for a, b in joins if a == n] + [a for a, b in joins if b == n] for n in range(10)}
    for n in range(10):
        connected = set(reachable([n], near.__getitem__))
        assert {m for m in range(10) if groups.of(m) == groups.of(n)} == connected


def test_the_first_ones_representative_stands_for_both() -> None:
    groups = Groups[str]()
    groups.join("a", "b")
    groups.join("a", "c")
    assert groups.of("b") == groups.of("c") == groups.of("a") == "a"
