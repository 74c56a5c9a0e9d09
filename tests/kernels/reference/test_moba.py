"""The reference against a plainer per-query loop, against dense attention, and against the laws."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, PACKINGS, Case
from tests.support.moba_loop import loop

# Sums of at most 100 float32 products of size 1: 100 * 2**-24, with room for exp and log.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


# The same in float64.
FLOAT64 = {"atol": 1e-13, "rtol": 1e-13}


CASES = [
    ("plain", Case()),
    ("tail block not full", Case(queries=37, length=37)),
    ("shorter than a block", Case(queries=5, length=5)),
    ("one token", Case(queries=1, length=1)),
    ("topk beyond the block count", Case(topk=9)),
    ("topk is the block count less one", Case(topk=4)),
    ("only the own block", Case(topk=1)),
    ("one sink", Case(topk=3, sinks=1)),
    ("as many sinks as topk allows", Case(topk=3, sinks=2)),
    ("block of one token", Case(queries=12, length=12, block=1, topk=3)),
    ("block not a power of two", Case(block=6)),
    ("one head", Case(kv_heads=1, group=1)),
    ("one key head for four query heads", Case(kv_heads=1, group=4)),
    ("fewer queries than keys", Case(queries=11)),
    ("one query", Case(queries=1)),
    ("value dim larger", Case(value_dim=12)),
    ("value dim smaller", Case(value_dim=4)),
    ("own scale", Case(scale=1.5)),
    ("left padding", Case(padding="left")),
    ("right padding", Case(padding="right")),
    ("holes", Case(padding="holes", topk=3, sinks=1)),
    ("a row without a real key", Case(padding="one row empty")),
    ("holes, fewer queries than keys", Case(padding="holes", queries=9)),
    *FEATURES,
    *GIVEN_MEANS,
]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_the_reference_equals_a_loop_over_single_queries(case: Case) -> None:
    query, key, value = case.inputs()
    out, lse = reference.moba_attention(query, key, value, case.arguments())
    expected_out, expected_lse, expected_chosen = loop(case, query, key, value)
    if case.packing == "none":
        names = "sinks", "scale", "key_mask", "causal", "key_bias", "block_means"
        gate = {name: getattr(case.arguments(), name) for name in names}
        chosen = reference.select_blocks(query, key, MobaArguments(case.block, case.topk, **gate))
        assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(out, expected_out, **FLOAT32)
    torch.testing.assert_close(lse, expected_lse, **FLOAT32)


@pytest.mark.parametrize(("topk", "sinks"), [(1, 0), (2, 0), (3, 0), (3, 2), (9, 0)])
def test_a_query_attends_topk_blocks_or_all_that_there_are(topk: int, sinks: int) -> None:
    case = Case(length=60, queries=60, topk=topk, sinks=sinks)
    query, key, _ = case.inputs()
    chosen = reference.select_blocks(query, key, MobaArguments(case.block, topk, sinks=sinks))
    own = torch.arange(60) // case.block
    assert torch.equal(chosen.sum(-1), (own + 1).clamp(max=topk).expand(2, 4, 60))
    index = torch.arange(chosen.shape[-1])
    assert chosen.gather(-1, own[:, None].expand(2, 4, 60, 1)).all()
    assert not (chosen & (index > own[:, None])).any()
    assert chosen[:, :, sinks * case.block :, :sinks].all()


def test_equal_scores_go_to_the_lower_block_and_a_better_one_still_wins() -> None:
    query = torch.ones(1, 1, 48, 4)
    key = torch.ones(1, 1, 48, 4)
    chosen = reference.select_blocks(query, key, MobaArguments(8, 3))
    assert chosen[0, 0, 47].tolist() == [True, True, False, False, False, True]
    key[0, 0, 24:32] += 2**-20
    chosen = reference.select_blocks(query, key, MobaArguments(8, 3))
    assert chosen[0, 0, 47].tolist() == [True, False, False, True, False, True]


def test_the_gate_does_not_round_a_mean_to_the_keys_dtype() -> None:
    # Block 1 has mean 1 + 2**-8, which bfloat16 would round to 1, the mean of block 0: a tie.
    key = torch.tensor([1, 1, 1, 1 + 2**-7, 0, 0]).view(1, 1, 6, 1).bfloat16()
    chosen = reference.select_blocks(torch.ones_like(key), key, MobaArguments(2, 2))
    assert chosen[0, 0, 5].tolist() == [False, True, True]


def test_given_means_are_what_the_gate_reads() -> None:
    query, key, value = Case(length=44, queries=44).inputs()
    means = reference.block_means(key, 8, *reference.key_positions(2, 44, None, key.device))
    plain = reference.moba_attention(query, key, value, MobaArguments(8, 3))
    # Five are before the last query's block; what lies beyond is not read.
    for given in (
        means[:, :, :5],
        torch.cat([means[:, :, :5], torch.full_like(means, torch.nan)], 2),
    ):
        same = reference.moba_attention(query, key, value, MobaArguments(8, 3, block_means=given))
        assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))
    turned = reference.select_blocks(query, key, MobaArguments(8, 2, block_means=-means[:, :, :5]))
    score = -(query @ means.repeat_interleave(2, 1).mT)[..., :5]
    assert torch.equal(turned[:, :, 43, :5].long().argmax(-1), score[:, :, 43].argmax(-1))
    best = reference.select_blocks(query, key, MobaArguments(8, 2))
    assert not torch.equal(turned, best)


def test_the_softmax_scale_does_not_change_the_choice() -> None:
    case = Case()
    query, key, _ = case.inputs()
    negative = reference.moba_attention(query, key, key, MobaArguments(8, 2, scale=-1.0))[1]
    visible = reference.select_blocks(query, key, MobaArguments(8, 2))
    keys = visible.repeat_interleave(8, -1) & torch.ones(40, 40, dtype=torch.bool).tril()
    score = -(query @ key.repeat_interleave(2, 1).mT)
    expected = score.masked_fill(~keys, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(negative, expected, **FLOAT32)


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize(("length", "queries"), [(40, 40), (33, 33), (40, 7), (3, 3)])
def test_enough_blocks_make_it_dense_attention(length: int, queries: int, sinks: int) -> None:
    case = Case(length=length, queries=queries, topk=5, sinks=sinks)
    query, key, value = (tensor.double() for tensor in case.inputs())
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 5, sinks=sinks))
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(out, dense, **FLOAT64)
    score = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    expected = score.masked_fill(~causal, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected, **FLOAT64)


DENSE = [
    ("softcap", {"softcap": 2.0}),
    ("bias", {"key_bias": torch.randn(2, 4, 40)}),
    ("bias of all heads", {"key_bias": torch.randn(1, 1, 40)}),
    ("bidirectional", {"causal": False}),
    ("bidirectional, softcap and bias",
     {"causal": False, "softcap": 1.0, "key_bias": torch.randn(1, 4, 40)}),
]  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("named", [row[1] for row in DENSE], ids=[row[0] for row in DENSE])
def test_enough_blocks_make_it_dense_attention_with_the_same_scores(
    named: dict[str, Any], padding: str
) -> None:
    case = Case(padding=padding)
    query, key, value = (tensor.nan_to_num().double() for tensor in case.inputs())
    out, lse = reference.moba_attention(
        query, key, value, MobaArguments(8, 5, key_mask=case.key_mask(), **named)
    )
    score = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    if "softcap" in named:
        score = named["softcap"] * torch.tanh(score / named["softcap"])
    if "key_bias" in named:
        score = score + named["key_bias"][:, :, None]
    visible = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    visible = visible if "causal" in named else visible.tril()
    if case.key_mask() is not None:
        visible = visible & case.key_mask()[:, None, None]  # type: ignore[index]
    score = score.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(lse, score.logsumexp(-1), **FLOAT64)
    dense = score.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, dense, **FLOAT64)


def test_alibi_by_key_is_alibi_by_distance() -> None:
    query, key, value = (tensor.double() for tensor in Case().inputs())
    slope, index = 0.5 ** torch.arange(1, 5).double(), torch.arange(40.0).double()
    bias = (slope[:, None] * index)[None]
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 5, key_bias=bias))
    distance = index[:, None] - index
    score = query @ key.repeat_interleave(2, 1).mT * 8**-0.5 - slope[:, None, None] * distance
    score = score.masked_fill(distance < 0, -torch.inf)
    dense = score.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, dense, **FLOAT64)
    torch.testing.assert_close(lse - bias, score.logsumexp(-1), **FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
def test_a_constant_bias_only_shifts_the_denominator(causal: bool) -> None:
    case = Case(topk=3, causal=causal, bias="all", scale=0.25)
    named = case.named()
    out, lse = reference.moba_attention(*case.inputs(), MobaArguments(8, 3, **named))
    named["key_bias"] = named["key_bias"] + 2.5
    again, shifted = reference.moba_attention(*case.inputs(), MobaArguments(8, 3, **named))
    torch.testing.assert_close(again, out, **FLOAT32)
    torch.testing.assert_close(shifted - 2.5, lse, **FLOAT32)


def test_the_gate_sees_the_bias_of_a_block_but_not_the_softcap() -> None:
    query, key = torch.ones(1, 1, 48, 4), torch.zeros(1, 1, 48, 4)
    key[:, :, 8:16] = 1.0  # block 1 scores 4
    plain = reference.select_blocks(query, key, MobaArguments(8, 2, scale=0.5))
    assert plain[0, 0, 47].nonzero().flatten().tolist() == [1, 5]
    bias = torch.zeros(1, 1, 48)
    bias[..., 24] = 17.0  # block 3: 17 / 8 / 0.5 = 4.25
    moved = reference.select_blocks(query, key, MobaArguments(8, 2, scale=0.5, key_bias=bias))
    assert moved[0, 0, 47].nonzero().flatten().tolist() == [3, 5]
    out, _ = reference.moba_attention(
        query, key, torch.eye(48)[None, None], MobaArguments(8, 2, scale=0.5, softcap=1e-3)
    )
    assert out[0, 0, 47].view(6, 8).sum(-1).gt(0).nonzero().flatten().tolist() == [1, 5]


@pytest.mark.parametrize(("topk", "sinks"), [(1, 0), (2, 0), (2, 1), (3, 1), (5, 2)])
def test_a_bidirectional_query_attends_topk_blocks_its_own_and_later_ones_too(
    topk: int, sinks: int
) -> None:
    query, key, _ = Case(length=44, queries=44).inputs()  # six blocks, the last of four keys
    chosen = reference.select_blocks(query, key, MobaArguments(8, topk, sinks=sinks, causal=False))
    assert chosen.sum(-1).eq(topk).all()
    own = torch.arange(44) // 8
    assert chosen.gather(-1, own[:, None].expand(2, 4, 44, 1)).all()
    assert chosen[..., :sinks].all()
    if topk > 1 + sinks:
        assert (chosen & (torch.arange(6) > own[:, None])).any()


def test_topk_one_is_block_diagonal_attention() -> None:
    query, key, value = (tensor.double() for tensor in Case(topk=1).inputs())
    out, _ = reference.moba_attention(query, key, value, MobaArguments(8, 1))
    parts = [
        F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        for part in zip(*(tensor.split(8, 2) for tensor in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2), **FLOAT64)


def test_a_permutation_of_key_heads_with_their_groups_permutes_the_output() -> None:
    case = Case(kv_heads=3)
    query, key, value = case.inputs()
    turn = torch.tensor([2, 0, 1])
    heads = torch.tensor([4, 5, 0, 1, 2, 3])
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 2))
    turned = reference.moba_attention(
        query[:, heads], key[:, turn], value[:, turn], MobaArguments(8, 2)
    )
    assert torch.equal(turned[0], out[:, heads])
    assert torch.equal(turned[1], lse[:, heads])


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_never_changes_a_real_tokens_output(padding: str) -> None:
    case = Case(padding=padding, topk=3, sinks=1)
    query, key, value = case.inputs()
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 3, **case.named()))
    mask = case.key_mask()
    assert mask is not None
    for row, real in enumerate(mask):
        alone = [tensor[row : row + 1, :, real] for tensor in (query, key, value)]
        expected = reference.moba_attention(*alone, MobaArguments(8, 3, sinks=1))
        torch.testing.assert_close(out[row : row + 1, :, real], expected[0], **FLOAT32)
        torch.testing.assert_close(lse[row : row + 1, :, real], expected[1], **FLOAT32)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("packing", PACKINGS[1:])
@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_sequence_is_what_it_is_alone(causal: bool, packing: str, padding: str) -> None:
    case = Case(length=60, queries=60, topk=3, sinks=1, bias="all", scale=0.25)
    case = case.but(packing=packing, padding=padding, causal=causal)
    query, key, value = case.inputs()
    named = case.named()
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 3, **named))
    mask = torch.ones(2, 60, dtype=torch.bool) if padding == "none" else named["key_mask"]
    for row, ids in enumerate(named["segments"]):
        for one in ids.unique():
            where = ids.eq(one) & mask[row]
            alone = [tensor[row : row + 1, :, where] for tensor in (query, key, value)]
            same = {name: named[name] for name in ("sinks", "scale", "causal")}
            bias = named["key_bias"][row : row + 1, :, where]
            expected = reference.moba_attention(*alone, MobaArguments(8, 3, key_bias=bias, **same))
            torch.testing.assert_close(out[row : row + 1, :, where], expected[0], **FLOAT32)
            torch.testing.assert_close(lse[row : row + 1, :, where], expected[1], **FLOAT32)


@pytest.mark.parametrize("queries", [1, 8, 11, 39])
def test_fewer_queries_than_keys_give_the_last_rows(queries: int) -> None:
    query, key, value = Case().inputs()
    out, lse = reference.moba_attention(query, key, value, MobaArguments(8, 2))
    last = reference.moba_attention(query[:, :, -queries:], key, value, MobaArguments(8, 2))
    torch.testing.assert_close(last[0], out[:, :, -queries:], **FLOAT32)
    torch.testing.assert_close(last[1], lse[:, :, -queries:], **FLOAT32)


def test_a_query_without_a_real_key_gives_zero_and_takes_no_gradient() -> None:
    case = Case(padding="one row empty")
    leaves = [tensor.requires_grad_() for tensor in case.inputs()]
    out, lse = reference.moba_attention(*leaves, MobaArguments(8, 2, **case.named()))
    assert out[0].eq(0).all()
    assert lse[0].isneginf().all()
    grads = torch.autograd.grad(out.sum() + lse[1, :, -1].sum(), leaves)
    assert all(grad[0].eq(0).all() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


GRADIENTS = [
    ("plain", Case(topk=2)),
    ("sinks", Case(topk=3, sinks=1)),
    ("fewer queries", Case(queries=3)),
    ("left padding", Case(padding="left")),
    ("holes", Case(padding="holes", scale=0.3)),
    ("bidirectional", Case(causal=False, padding="holes")),
    ("softcap", Case(softcap=0.5)),
    ("bias", Case(bias="all", scale=0.3)),
    ("bias of all heads, packed", Case(bias="by row", packing="interleaved", scale=0.3)),
    ("everything", Case(softcap=1.0, bias="by head", packing="runs", causal=False, scale=0.3)),
]


@pytest.mark.parametrize(
    "case", [case for _, case in GRADIENTS], ids=[name for name, _ in GRADIENTS]
)
def test_gradients_of_the_reference_are_derivatives(case: Case) -> None:
    case = case.but(batch=1, length=10, queries=min(case.queries, 10), block=2, dim=2, value_dim=3)
    # Off the grid: a finite difference of 1e-6 must not step over a tie of the gate.
    shapes = [tensor.shape for tensor in case.inputs()]
    named = case.named()
    if named["key_bias"] is not None:
        shapes.append(named["key_bias"].shape)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        bias = {"key_bias": inputs[3]} if len(inputs) > 3 else {}
        out, lse = reference.moba_attention(
            *inputs[:3], MobaArguments(case.block, case.topk, **named | bias)
        )
        return out, lse[lse.isfinite()]  # -inf has no derivative

    assert torch.autograd.gradcheck(function, leaves)
