"""Disjoint sets against a partition that is kept by hand."""

from hypothesis import given
from hypothesis import strategies as st

from moonfx.passes.graph.union_find import UnionFind

ITEMS = st.integers(0, 12)


@given(st.lists(st.tuples(ITEMS, ITEMS)))
def test_items_have_one_representative_if_and_only_if_they_were_joined(
    pairs: list[tuple[int, int]],
) -> None:
    sets, partition = UnionFind[int](), {i: {i} for i in range(13)}
    for first, second in pairs:
        sets.join(first, second)
        together = partition[first] | partition[second]
        partition |= dict.fromkeys(together, together)
    for i in range(13):
        assert sets.find(i) in partition[i]
        assert {j for j in range(13) if sets.find(j) == sets.find(i)} == partition[i]


def test_a_set_is_represented_by_the_first_of_what_is_joined() -> None:
    sets = UnionFind[str]()
    sets.join("a", "b")
    sets.join("c", "b")
    assert [sets.find(x) for x in "abcd"] == ["c", "c", "c", "d"]
