"""Keys have their features last before they are transposed, by any names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.attention.key_transpose import check_token_major
from moonfx.site import Declined
from tests.passes.attention.forms import (
    SCALE,
    B,
    D,
    H,
    Model,
    N,
    captured,
    inputs,
    outcome,
    result,
    run,
)
from tests.passes.attention.lookalikes import Body, Row, attend, check_lookalike


def permuted_keys(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """K = Linear.view(b, t, H, D).permute(0, 2, 3, 1): pytorch#195320, #195282."""
    stored = k.transpose(1, 2).contiguous()
    s = q @ stored.view(q.shape[0], q.shape[2], H, D).permute(0, 2, 3, 1) * SCALE
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return s.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("n", [H, 3, 40])
def test_permuted_keys_are_right_whether_tokens_equal_heads_or_not(n: int) -> None:
    q, k, v = inputs(n=n)
    model = Model(permuted_keys)
    out, report = run(model, q, k, v, block=2, topk=1)
    assert outcome(report) == ["causal"]
    expected, _ = moba_attention(q, k, v, MobaArguments(2, 1))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def keys_as_they_are(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.cat([q, q, q], -1)  # head_dim == N: the product exists without a transpose
    return attend(q @ torch.cat([k, k, k], -1) * SCALE, v)


def keys_transposed_twice(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.cat([q, q, q], -1)
    return attend(q @ torch.cat([k, k, k], -1).transpose(2, 3).transpose(2, 3) * SCALE, v)


LOOKALIKES: list[Row] = [
    ("keys not transposed", keys_as_they_are, "the keys are not transposed"),
    ("keys transposed twice", keys_transposed_twice, "the keys are not transposed"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)


Change = Callable[[Tensor], Tensor]

# Name, what is done to keys [B, H, N, D], and whether their features end up before their tokens.
CHANGES: list[tuple[str, Change, bool]] = [
    ("transposed", lambda k: k.transpose(-2, -1), True),
    ("transposed, then scaled", lambda k: k.transpose(2, 3) * SCALE, True),
    ("cast, then transposed", lambda k: k.to(torch.float64).mT, True),
    ("three times", lambda k: k.mT.mT.mT, True),
    ("as they are", lambda k: k * SCALE, False),
    ("heads transposed", lambda k: k.transpose(0, 1), False),
    ("viewed after it", lambda k: k.transpose(2, 3).reshape(B, H, N, D), False),
]


@pytest.mark.parametrize(
    ("change", "proved"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES]
)
def test_the_tokens_of_keys_are_proved_to_be_last(change: Change, proved: bool) -> None:
    node = result(captured(change, (torch.zeros(B, H, N, D),)))
    if proved:
        check_token_major(node)
    else:
        with pytest.raises(Declined, match="the keys are not transposed"):
            check_token_major(node)
