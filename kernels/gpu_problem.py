"""Where the rows and blocks of a call lie: what a GPU kernel reads in place of masks, segments.

    slot    a place in the sorted keys of a batch row: a sequence's real tokens are adjacent
    block   a run of at most `block` slots of one sequence; numbered within the batch row
    row     a query of one kv head: row r * G + g is the g-th query head of the kv head, at the
            r-th place of the sorted queries; so the G heads of a group are adjacent

Everything is computed on the device, in tensors whose sizes follow from shapes: no host waits.

Shape letters: B batch, Hq = Hkv * G heads, Nq queries, Nk keys, n block numbers in a batch row,
R = Nq * G rows of a kv head, K routes of a row.
"""

from typing import NamedTuple

from torch import Tensor


class Queries(NamedTuple):
    """Of each place r in the sorted queries, int32 [B, Nq] (the batch stride may be 0).

    Args:
        last: the last slot that it sees, -1 for none.
        own: the number of its own block, -1 if it sees nothing.
        first, end: the blocks first .. end - 1 are its candidates, `own` and its sinks among them
            or not: causal has end = own, bidirectional the end of its sequence.
        index: the query at this place; None where place r is query r.
    """

    last: Tensor
    own: Tensor
    first: Tensor
    end: Tensor
    index: Tensor | None


class Blocks(NamedTuple):
    """Of each block number, int32 [B, n] (the batch stride may be 0).

    Args:
        start: its first slot. size: its real keys, 0 for a number that is not used.
        token: int32 [B, Nk], the key at each slot; None where slot s is key s.
    """

    start: Tensor
    size: Tensor
    token: Tensor | None


class Layout(NamedTuple):
    """A call's sorted order. block, topk and sinks are those that run: one block where it is dense.

    Args:
        n: block numbers in a batch row, used or not. group: query heads of a kv head.
    """

    queries: Queries
    blocks: Blocks
    block: int
    topk: int
    sinks: int
    n: int
    group: int
    causal: bool
