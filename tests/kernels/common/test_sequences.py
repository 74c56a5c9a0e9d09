"""Where tokens lie: positions, sorting and blocks against a plain loop over each row."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.sequences import Sequences
from tests.support.moba_cases import PACKINGS, PADDINGS, Case

WHOLE = slice(None)


def sequences_of(case: Case) -> Sequences:
    device = torch.device("cpu")
    return Sequences(case.batch, case.length, case.key_mask(), case.segments(), device)


def members(case: Case, row: int) -> dict[int, list[int]]:
    """The real tokens of each sequence of a row, in their order."""
    mask, segments = case.key_mask(), case.segments()
    found: dict[int, list[int]] = {}
    for token in range(case.length):
        own = found.setdefault(0 if segments is None else int(segments[row, token]), [])
        if mask is None or mask[row, token]:
            own.append(token)
    return found


def test_a_block_is_a_run_of_sorted_places_of_one_sequence() -> None:
    a, b = 3, -1
    segments = torch.tensor([[a, b, a, a, b, a, b]])
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    sequences = Sequences(1, 7, mask, segments, torch.device("cpu"))
    assert sequences.order is not None
    assert sequences.order.tolist() == [[1, 4, 6, 0, 3, 5, 2]]
    blocks, first = sequences.blocks(2)
    assert blocks.start.tolist() == [[0, 2, 3, 5]]
    assert blocks.size.tolist() == [[2, 1, 2, 1]]
    assert blocks.first.tolist() == [[0, 0, 2, 2]]
    assert blocks.count.tolist() == [[3, 3, 3, 3]]
    assert first.tolist() == [[2, 0, 2, 2, 0, 2, 0]]
    assert sequences.tokens.rank.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("block", [1, 4, 64])
def test_positions_and_blocks_are_those_of_each_sequence_alone(
    packing: str, padding: str, block: int
) -> None:
    case = Case(batch=3, length=30, packing=packing, padding=padding)
    sequences, segments = sequences_of(case), case.segments()
    blocks, first = sequences.blocks(block)
    order = torch.arange(30).expand(3, -1) if sequences.order is None else sequences.order
    for row in range(3):
        assert sorted(order[row].tolist()) == list(range(30))
        of_sequence = members(case, row)
        for token in range(30):
            mine = of_sequence[0 if segments is None else int(segments[row, token])]
            assert sequences.tokens.count[row, token] == len(mine)
            assert sequences.tokens.rank[row, token] == sum(j <= token for j in mine) - 1
            for number in range(-(-len(mine) // block)):
                at = first[row, token] + number
                keys = mine[number * block : (number + 1) * block]
                start, size = blocks.start[row, at], blocks.size[row, at]
                assert order[row, start : start + size].tolist() == keys
                assert blocks.first[row, at] == first[row, token]
                assert blocks.count[row, at] == len(mine)
        total = sum(-(-len(mine) // block) for mine in of_sequence.values())
        assert int((blocks.size[row] > 0).sum()) == total


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("packing", ["none", "runs", "interleaved"])
def test_unsort_undoes_sort_and_padding_is_zero_both_ways(packing: str, padding: str) -> None:
    case = Case(packing=packing, padding=padding)
    sequences, key = sequences_of(case), case.inputs()[1]
    flat = sequences.sort(key, WHOLE)
    assert flat.shape == (2 * 2 * 40, 8)
    assert flat.isfinite().all()
    assert torch.equal(sequences.unsort(flat, key.shape, WHOLE), key.nan_to_num())
    mask = case.key_mask()
    if mask is not None:
        ones = torch.ones_like(flat)
        kept: Tensor = sequences.unsort(ones, key.shape, WHOLE)
        assert torch.equal(kept.bool(), mask[:, None, :, None].expand_as(key))
