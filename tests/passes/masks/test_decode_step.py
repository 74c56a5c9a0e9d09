"""One query at the end of a cache of keys, told from one query of anything else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moonfx.passes.masks.decode_step import appended
from moonfx.site import AttentionSite
from tests.support.reading import returned, traced

PAST, NEW, QUERY = torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
Keys = Callable[[Tensor, Tensor], Tensor]

# The keys, and whether they are transposed.
STEPS: list[tuple[str, Keys, bool]] = [
    ("cat", lambda past, new: torch.cat([past, new], 2), False),
    ("cat by a dim from the end", lambda past, new: torch.cat([past, new], dim=-2), False),
    ("copied and cast", lambda past, new: torch.cat([past, new], 2).contiguous().double(), False),
    ("transposed", lambda past, new: torch.cat([past.mT, new.mT], -1), True),
    ("three parts", lambda past, new: torch.cat([past, past, new], 2), False),
]


def site(keys: Keys, transposed: bool, new: Tensor = NEW) -> AttentionSite:
    key = returned(traced(keys, PAST, new))
    found = AttentionSite(key, key, key, key, "sdpa", "", "")
    found.key_transposed = transposed
    return found


@pytest.mark.parametrize(("keys", "transposed"), [s[1:] for s in STEPS], ids=[s[0] for s in STEPS])
def test_a_new_token_at_the_end_of_a_cache_is_a_step(keys: Keys, transposed: bool) -> None:
    assert appended(site(keys, transposed))


OTHERS: list[tuple[str, Keys, bool]] = [
    ("no cache", lambda past, new: past + new, False),
    ("the new one first", lambda past, new: torch.cat([new, past], 2), False),
    ("along the features", lambda past, new: torch.cat([past, past], 3), False),
    ("along the heads", lambda past, new: torch.cat([past, past], 1), False),
    ("another layout", lambda past, new: torch.cat([past, new], 2), True),
    ("computed after", lambda past, new: torch.cat([past, new], 2) * 2, False),
    ("moved after", lambda past, new: torch.cat([past, new], 2).flip(2), False),
]


@pytest.mark.parametrize(
    ("keys", "transposed"), [s[1:] for s in OTHERS], ids=[s[0] for s in OTHERS]
)
def test_what_only_looks_like_a_step_is_none(keys: Keys, transposed: bool) -> None:
    assert not appended(site(keys, transposed))


def test_several_new_tokens_are_no_step() -> None:
    assert not appended(site(STEPS[0][1], False, torch.zeros(1, 2, 2, 4)))
