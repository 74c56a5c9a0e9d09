"""Keys and values repeated for a group of query heads are read from before that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.attention.repeated_heads import one_repeated, ungrouped
from tests.passes.attention.forms import B, D, H, Model, N, captured, hidden, inputs, result, run
from tests.passes.attention.lookalikes import scores


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(scores(q, k)).softmax(-1) @ v


def test_heads_repeated_for_their_group_are_folded_back() -> None:
    def expanded(x: Tensor) -> Tensor:
        return x[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D)

    def by_interleave(x: Tensor) -> Tensor:
        return torch.repeat_interleave(x, 2, dim=1)

    q, k, v = inputs()
    k, v = k[:, :2], v[:, :2]
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2))
    for repeat in (expanded, by_interleave):

        def body(self: Model, q: Tensor, k: Tensor, v: Tensor, r: Any = repeat) -> Tensor:
            return plain(q, r(k), r(v))

        out, report = run(Model(body), q, k, v, block=4, topk=2)
        assert [(r.heads, r.kv_heads, r.action) for r in report.rows] == [(4, 2, "sparse")]
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_a_tiled_repeat_is_not_taken_for_a_group() -> None:
    """k.repeat(1, 2, 1, 1) gives query head h the key head h % 2, not h // 2."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    def transposed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, None].expand(B, 2, 2, N, D).reshape(B, H, N, D) for x in (k, v))
        return plain(q, k, v)

    q, k, v = inputs()
    k, v = k[:, :2], v[:, :2]
    dense = plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    for each in (body, transposed):
        out, report = run(Model(each), q, k, v)
        assert [(r.heads, r.kv_heads) for r in report.rows] == [(4, 4)]
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


Repeat = Callable[[Tensor], Tensor]

# Name, keys [B, 2, N, D] repeated for two query heads each, and whether each is beside itself.
REPEATS: list[tuple[str, Repeat, bool]] = [
    ("expanded", lambda k: k[:, :, None].expand(B, 2, 2, N, D).reshape(B, 4, N, D), True),
    ("interleaved", lambda k: k.repeat_interleave(2, 1), True),
    ("stacked", lambda k: torch.stack([k, k], 2).flatten(1, 2), True),
    ("joined", lambda k: torch.cat([k[:, :, None]] * 2, 2).flatten(1, 2), True),
    ("tokens first", lambda k: k.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2), True),
    ("tiled", lambda k: k.repeat(1, 2, 1, 1), False),
    ("joined whole", lambda k: torch.cat([k, k], 1), False),
    ("another stacked", lambda k: torch.stack([k, k * 2], 2).flatten(1, 2), False),
    ("tokens interleaved", lambda k: k.repeat_interleave(2, 2), False),
    ("folded elsewhere", lambda k: torch.stack([k, k], 2).view(B, 2, 2 * N, D), False),
]


@pytest.mark.parametrize(("repeat", "found"), [r[1:] for r in REPEATS], ids=[r[0] for r in REPEATS])
def test_only_heads_beside_themselves_are_a_group(repeat: Repeat, found: bool) -> None:
    k = torch.randn(B, 2, N, D)
    gm = captured(lambda k: repeat(k), (k,))
    node = result(gm)
    narrow = ungrouped(node, 1, node)
    assert (narrow is not None) == found
    if narrow is not None:
        node.replace_all_uses_with(narrow)
        gm.recompile()
        torch.testing.assert_close(gm(k), k, atol=0, rtol=0)


def test_one_of_size_one_repeated_along_its_dim_is_read_and_no_other() -> None:
    one, two = torch.zeros(B, 1, N, D), torch.zeros(B, 2, N, D)
    expand = lambda k: k.expand(B, 4, N, D)  # noqa: E731
    assert one_repeated(result(captured(expand, (one,))), 1) is not None
    assert one_repeated(result(captured(expand, (one,))), 2) is None
    assert one_repeated(result(captured(lambda k: torch.cat([k, k], 1), (one,))), 1) is not None
    assert one_repeated(result(captured(lambda k: torch.cat([k, k], 1), (two,))), 1) is None
    both = lambda k: k[:, :, :1].expand(B, 4, N, D)  # noqa: E731
    assert one_repeated(result(captured(both, (one,))), 1) is None
