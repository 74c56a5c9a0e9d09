"""The public function: what it computes, by its laws and against the reference."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from moonfx import moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, PACKINGS, Case, feature_cases
from tests.support.moba_operator import TOLERANCE, leaves_of

ROWS = FEATURES + GIVEN_MEANS


def assert_like_reference(case: Case) -> None:
    mine, theirs = leaves_of(case), leaves_of(case)
    named, bias = case.named(), case.key_bias()
    calls = []
    for leaves in (mine, theirs):
        leaves += [] if bias is None else [bias.clone().requires_grad_()]
        calls.append(named | ({} if bias is None else {"key_bias": leaves[3]}))
    out, lse = moba_attention(*mine[:3], case.block, case.topk, **calls[0], return_lse=True)
    expected, expected_lse = reference.moba_attention(
        *theirs[:3], MobaArguments(case.block, case.topk, **calls[1])
    )
    tolerance = TOLERANCE[case.dtype]
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE[torch.float32])
    grad_out = (torch.randint(-8, 9, out.shape) / 8).to(out)
    grad_lse = torch.randint(-8, 9, lse.shape) / 8
    grads = torch.autograd.grad((out, lse), mine, (grad_out, grad_lse))
    wanted = torch.autograd.grad((expected, expected_lse), theirs, (grad_out, grad_lse))
    for name, grad, want in zip("qkvb"[: len(mine)], grads, wanted, strict=True):
        assert grad.shape == want.shape
        torch.testing.assert_close(grad, want, **tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
def test_each_feature_and_its_gradients_equal_the_reference(case: Case) -> None:
    assert_like_reference(case)


@pytest.mark.usefixtures("kernel")
def test_the_operator_and_its_gradients_equal_the_reference() -> None:
    @settings(max_examples=60)
    @given(feature_cases())
    def check(case: Case) -> None:
        torch.manual_seed(case.seed)
        assert_like_reference(case)

    check()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("length", [33, 40])
def test_enough_blocks_make_it_dense_attention(length: int, sinks: int) -> None:
    case = Case(length=length, queries=length)
    mine, theirs = leaves_of(case), leaves_of(case)
    out = moba_attention(*mine, 8, 5, sinks=sinks)
    dense = F.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, **TOLERANCE[torch.float32])
    grad = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad(out, mine, grad), torch.autograd.grad(dense, theirs, grad), strict=True
    ):
        torch.testing.assert_close(left, right, **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_never_changes_a_real_token(padding: str) -> None:
    case = Case(padding=padding, topk=3, sinks=1)
    leaves, mask = leaves_of(case), case.key_mask()
    assert mask is not None
    out = moba_attention(*leaves, 8, 3, sinks=1, key_mask=mask)
    real_rows = mask[:, None, :, None]
    grad_out = torch.randn_like(out).masked_fill(~real_rows, 0.0)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for row, real in enumerate(mask):
        alone = [leaf[row : row + 1, :, real].detach().requires_grad_() for leaf in leaves]
        expected = moba_attention(*alone, 8, 3, sinks=1)
        torch.testing.assert_close(
            out[row : row + 1, :, real], expected, **TOLERANCE[torch.float32]
        )
        wanted = torch.autograd.grad(expected, alone, grad_out[row : row + 1, :, real])
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(
                grad[row : row + 1, :, real], want, **TOLERANCE[torch.float32]
            )
            assert grad[row, :, ~real].eq(0).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("packing", PACKINGS[1:])
@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_sequence_is_what_it_is_alone(packing: str, causal: bool) -> None:
    case = Case(length=60, queries=60, topk=3, sinks=1, packing=packing, causal=causal)
    leaves, segments = leaves_of(case), case.segments()
    assert segments is not None
    out = moba_attention(*leaves, 8, 3, sinks=1, causal=causal, segments=segments)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for row, ids in enumerate(segments):
        for one in ids.unique():
            here = ids.eq(one)
            alone = [leaf[row : row + 1, :, here].detach().requires_grad_() for leaf in leaves]
            expected = moba_attention(*alone, 8, 3, sinks=1, causal=causal)
            torch.testing.assert_close(
                out[row : row + 1, :, here], expected, **TOLERANCE[torch.float32]
            )
            wanted = torch.autograd.grad(expected, alone, grad_out[row : row + 1, :, here])
            for grad, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(
                    grad[row : row + 1, :, here], want, **TOLERANCE[torch.float32]
                )


def extra_column(leaves: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense causal attention with one more logit per head, whose value is 0: out and lse."""
    query, key, value, sink = leaves
    score = query @ key.repeat_interleave(2, 1).mT * query.shape[3] ** -0.5
    hidden = torch.ones(score.shape[2:], dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    score = score.masked_fill(hidden, -torch.inf)
    column = sink[:, None, None].expand(score.shape[0], -1, score.shape[2], 1)
    score = torch.cat([score, column.to(score)], -1)
    out = score.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)
    return out, score.logsumexp(-1)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("padding", ["none", "left", "one row empty"])
def test_sink_logits_are_one_more_column_of_the_softmax(padding: str) -> None:
    case = Case(padding=padding)
    mask = case.key_mask()
    inputs = [tensor.nan_to_num() for tensor in case.inputs()]
    inputs.append(torch.tensor([-2.0, 0.0, 1.5, 30.0]))
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    got = moba_attention(*mine[:3], 8, 5, key_mask=mask, sink_logits=mine[3], return_lse=True)
    expected = extra_column(theirs, mask)
    upstream = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, mine, upstream)
    wanted = torch.autograd.grad(expected, theirs, upstream)
    for left, right in zip((*got, *grads), (*expected, *wanted), strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_sink_logits_take_part_of_what_a_query_would_attend() -> None:
    case = Case(topk=3, dtype=torch.bfloat16)
    leaves = leaves_of(case)
    sink = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    plain, lse = moba_attention(*leaves, 8, 3, return_lse=True)
    out, more = moba_attention(*leaves, 8, 3, sink_logits=sink, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert more.dtype == torch.float32
    kept = (lse - more).exp()[..., None]
    torch.testing.assert_close(out, (plain * kept).bfloat16(), **TOLERANCE[torch.bfloat16])
    out.float().sum().backward()
    assert sink.grad is not None
    assert sink.grad.dtype == torch.bfloat16


NOTHING_SEEN = [
    ("plain", {}),
    ("bidirectional", {"causal": False}),
    ("softcap", {"softcap": 1.0}),
    ("bias", {"key_bias": torch.randn(2, 4, 40)}),
    ("packed", {"segments": torch.arange(40).remainder(3).expand(2, 40)}),
    ("sink logits", {"sink_logits": torch.randn(4)}),
    ("all", {"causal": False, "softcap": 1.0, "key_bias": torch.randn(1, 1, 40),
             "segments": torch.arange(40).expand(2, 40), "sink_logits": torch.randn(4)}),
]  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "named", [row[1] for row in NOTHING_SEEN], ids=[r[0] for r in NOTHING_SEEN]
)
def test_a_row_without_a_real_key_gives_zero_and_finite_gradients(named: dict[str, Any]) -> None:
    case = Case(padding="one row empty", topk=3)
    leaves = leaves_of(case)
    named = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    more = [named[name].requires_grad_() for name in ("key_bias", "sink_logits") if name in named]
    out, lse = moba_attention(*leaves, 8, 3, key_mask=case.key_mask(), **named, return_lse=True)
    assert out[0].eq(0).all()
    assert out.isfinite().all()
    loss = out.square().sum() + lse[lse.isfinite()].sum()
    for grad in torch.autograd.grad(loss, leaves + more):
        assert grad.isfinite().all()


@pytest.mark.usefixtures("kernel")
def test_equal_scores_go_to_the_lower_block() -> None:
    query, key = torch.ones(1, 1, 48, 8), torch.ones(1, 1, 48, 8)
    value = torch.eye(48).view(1, 1, 48, 48)
    out = moba_attention(query, key, value, 8, 3)
    attended = out[0, 0, 47].view(6, 8).sum(-1) > 0
    assert attended.tolist() == [True, True, False, False, False, True]


@pytest.mark.usefixtures("kernel")
def test_topk_one_is_block_diagonal_attention() -> None:
    query, key, value = Case().inputs()
    out = moba_attention(query, key, value, 8, 1)
    parts = [
        F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        for part in zip(*(tensor.split(8, 2) for tensor in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2), **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_a_permutation_of_key_heads_with_their_groups_permutes_the_output() -> None:
    query, key, value = Case(kv_heads=3).inputs()
    turn, heads = torch.tensor([2, 0, 1]), torch.tensor([4, 5, 0, 1, 2, 3])
    out = moba_attention(query, key, value, 8, 2)
    turned = moba_attention(query[:, heads], key[:, turn], value[:, turn], 8, 2)
    torch.testing.assert_close(turned, out[:, heads], **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_the_backward_repeats_bit_for_bit() -> None:
    # Off the grid, where another order of summation would show.
    leaves = [torch.randn(2, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = moba_attention(*leaves, 16, 5, sinks=1)
            runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.usefixtures("kernel")
def test_given_means_decide_the_choice_and_have_no_gradient() -> None:
    leaves = leaves_of(Case(topk=2, length=64, queries=64))
    means = torch.zeros(2, 2, 7, 8)
    means[:, :, 3] = 8.0
    query = leaves[0].abs()
    means.requires_grad_()
    out = moba_attention(query, *leaves[1:], 8, 2, block_means=means)
    own = [leaf[:, :, 56:] for leaf in leaves[1:]]
    best = [leaf[:, :, 24:32] for leaf in leaves[1:]]
    both = [torch.cat(pair, 2) for pair in zip(best, own, strict=True)]
    expected = F.scaled_dot_product_attention(
        query[:, :, 56:],
        *both,
        attn_mask=torch.ones(8, 16).tril(8).bool(),
        enable_gqa=True,
    )
    torch.testing.assert_close(out[:, :, 56:], expected, **TOLERANCE[torch.float32])
    assert torch.autograd.grad(out.sum(), means, allow_unused=True) == (None,)
