"""Facts go into a checkpoint as numbers, and come out as they were."""

import io
import random

import pytest
import torch

from moonfx.optim.facts import KEYS, Fact, layout_code, layout_of, loaded, saved
from moonfx.optim.matrices import KINDS, Layout
from tests.support.optim.by_hand import Row

LAYOUTS = [
    *(Layout(kind) for kind in KINDS),
    *(Layout(dim=1), Layout("batch", 1, 8, (64, 64, 32))),
    *(Layout(outer=2**31), Layout(sizes=(2**32 - 1,) * 128), Layout(sizes=(3, 1) * 9)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_the_one_that_its_number_says(layout) -> None:
    assert layout_of(layout_code(layout)) == layout


@pytest.mark.parametrize("code", [-1, 0, 5, 1 << 64 | len(KINDS), 1 << 64 | 7 << 96])
def test_a_number_of_no_layout_is_refused(code) -> None:
    with pytest.raises(ValueError, match=f"{code} is no number of a layout"):
        layout_of(code)


@pytest.mark.parametrize("ratio", [None, 1.25])
def test_facts_are_numbers_that_torch_loads_without_trust(ratio) -> None:
    sizes = tuple(random.Random(0).choices(range(1, 9999), k=25))
    fact = Fact(Row("a.weight", layout=Layout(sizes=sizes)), 0.3, ratio)
    file = io.BytesIO()
    torch.save(saved(fact), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert tuple(state) == KEYS
    assert all(isinstance(value, int | float) for value in state.values())
    assert loaded(Fact(Row("a.weight"), 0.2), state) == fact
