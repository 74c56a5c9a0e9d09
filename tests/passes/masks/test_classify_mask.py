"""What a mask is proved to be, for every shape: a table of masks written by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.attention.forms import NEG
from tests.passes.masks.traced_masks import (
    CAUSAL,
    PADDED,
    B,
    columns,
    float_mask,
    real_keys,
    rows,
    trace,
    verdict,
)

# name, mask(n, k[, real]), expected
MASKS: list[tuple[str, Callable[..., Tensor], str]] = [
    ("less or equal", lambda n, k: columns(k) <= rows(n) + (k - n), CAUSAL),
    ("less than", lambda n, k: columns(k) < rows(n) + (k - n) + 1, CAUSAL),
    ("greater or equal", lambda n, k: rows(n) + (k - n) >= columns(k), CAUSAL),
    ("not greater", lambda n, k: ~(columns(k) > rows(n) + (k - n)), CAUSAL),
    ("difference", lambda n, k: rows(n) + (k - n) - columns(k) >= 0, CAUSAL),
    ("arange from an offset", lambda n, k: columns(k) <= torch.arange(k - n, k)[:, None], CAUSAL),
    ("tril", lambda n, k: torch.ones(k, k).tril()[k - n :] > 0, CAUSAL),
    ("tril of a bool", lambda n, k: torch.ones(n, k, dtype=torch.bool).tril(k - n), CAUSAL),
    ("triu of -inf", lambda n, k: torch.full((n, k), -torch.inf).triu(k - n + 1), CAUSAL),
    ("1 - tril", lambda n, k: (1.0 - torch.ones(n, k).tril(k - n)) * -1e9, CAUSAL),
    ("where", lambda n, k: torch.where(columns(k) <= rows(n) + (k - n), 0.0, NEG), CAUSAL),
    ("float of a bool", lambda n, k: float_mask(columns(k) <= rows(n) + (k - n)), CAUSAL),
    ("mul of bools", lambda n, k: (columns(k) <= rows(n) + (k - n)) * (columns(k) >= 0), CAUSAL),
    ("float positions", lambda n, k: columns(k).float() <= rows(n).float() + (k - n), CAUSAL),
    ("always true and", lambda n, k: (columns(k) <= rows(n) + (k - n)) & (columns(k) < k), CAUSAL),
    ("or never true", lambda n, k: (columns(k) <= rows(n) + (k - n)) | (columns(k) >= k), CAUSAL),
    ("padding", lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & real_keys(m), PADDED),
    (
        "padding gathered",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) & m.bool()[:, torch.arange(k)][:, None, None]
        ),
        PADDED,
    ),
    (
        "padding added",
        lambda n, k, m: float_mask(columns(k) <= rows(n) + (k - n)) + float_mask(real_keys(m)),
        PADDED,
    ),
    (
        "padding by where",
        lambda n, k, m: torch.where(real_keys(m), float_mask(columns(k) <= rows(n) + (k - n)), NEG),
        PADDED,
    ),
    ("top-left", lambda n, k: columns(k) <= rows(n), "causal with offset 0"),
    ("strict", lambda n, k: columns(k) < rows(n) + (k - n), "causal with offset"),
    ("one ahead", lambda n, k: columns(k) <= rows(n) + (k - n) + 1, "causal with offset"),
    ("half positions", lambda n, k: columns(k).half() <= rows(n).half() + (k - n), "the values of"),
    (
        "steps of two",
        lambda n, k: torch.arange(0, 2 * k, 2)[None] <= rows(n) + (k - n),
        "unsupported",
    ),
    ("sum", lambda n, k: columns(k) + rows(n) <= k, "unsupported"),
    (
        "window",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) & (columns(k) > rows(n) + (k - n) - 4),
        "sliding window of 4",
    ),
    ("only padding", lambda n, k, m: real_keys(m).expand(B, 1, n, k), "the mask is not causal"),
    (
        "padding of queries",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & (m[:, None, -n:, None] != 0),
        "whole queries",
    ),
    (
        "padding or causal",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) | real_keys(m),
        "prefix-LM: the keys of a prefix (by 'stack')",
    ),
    (
        "padding shifted back",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & real_keys(m.roll(1, 1)),
        PADDED,
    ),
    (
        "padding by rank",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & (m.cumsum(1)[:, None, None] > 0),
        PADDED,
    ),
    (
        "padding read by row",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) & (m.T[:B, None, :1].expand(B, 1, 1) != 0)[:, None]
        ),
        "whole rows of the batch",
    ),
    (
        "float padding",
        lambda n, k, m: (
            float_mask(columns(k) <= rows(n) + (k - n)) + (1.0 - m[:, None, None].float()) * NEG
        ),
        PADDED,
    ),
    (
        "or everything",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) | (rows(n) >= 0),
        "the mask is not causal",
    ),
    ("triu of True", lambda n, k: ~torch.ones(n, k, dtype=torch.bool).triu(k - n + 1), CAUSAL),
    ("clamped", lambda n, k: (columns(k) - rows(n) - (k - n)).clamp(min=0) == 0, "unsupported"),
    ("log of 0 and 1", lambda n, k: torch.ones(n, k).tril(k - n).log(), CAUSAL),
    (
        "min and min",
        lambda n, k, m: (
            torch.where(columns(k) <= rows(n) + (k - n), 0.0, NEG)
            + torch.where(real_keys(m), 0.0, NEG)
        ),
        PADDED,
    ),
    (
        "1 - product",
        lambda n, k, m: (
            (1.0 - (columns(k) <= rows(n) + (k - n)).float() * real_keys(m).float()) * NEG
        ),
        PADDED,
    ),
    (
        "counted positions",
        lambda n, k: torch.ones(k).cumsum(0)[None] <= torch.ones(n).cumsum(0)[:, None] + (k - n),
        CAUSAL,
    ),
    (
        "chunk",
        lambda n, k: (
            (columns(k) <= rows(n) + (k - n)) & (columns(k) // 4 == (rows(n) + (k - n)) // 4)
        ),
        "chunked attention of 4 tokens",
    ),
    (
        "window to both sides",
        lambda n, k: (rows(n) + (k - n) - columns(k)).abs() <= 3,
        "sliding window of 7 tokens, 3 to either side",
    ),
    (
        "prefix",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) | (columns(k) < m.sum(1)[:, None, None, None])
        ),
        "prefix-LM: the keys of a prefix (by 'sum_1')",
    ),
    (
        "groups seen both ways",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) | (m[:, None, -n:, None] == m[:, None, None])
        ),
        "a choice between masks: causal, or",
    ),
    (
        "nothing",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) & (rows(n) < 0),
        "the mask hides every key",
    ),
]


def takes_padding(mask: Callable[..., Tensor]) -> bool:
    return mask.__code__.co_argcount == 3


TRIL = next(mask for name, mask, _ in MASKS if name == "tril")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (5, 12)], ids=["square", "chunk"])
@pytest.mark.parametrize(("mask", "expected"), [m[1:] for m in MASKS], ids=[m[0] for m in MASKS])
def test_a_mask_is_named_for_every_shape(
    mask: Callable[..., Tensor], expected: str, queries: int, keys: int, dynamic: bool
) -> None:
    got = verdict(trace(mask, queries, keys, dynamic=dynamic, padding=takes_padding(mask)))
    if expected == "causal with offset 0" and queries == keys:
        expected = CAUSAL
    if mask is TRIL and dynamic and queries < keys:
        expected = "the values of"  # k - n is not known to be a position from the front
    if expected in (CAUSAL, PADDED):
        assert got == expected
    else:
        assert got.startswith(expected) or expected in got
