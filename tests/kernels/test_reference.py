"""The reference against a plainer per-query loop, against dense attention, and against the laws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels import reference
from tests.moba_cases import Case

# Sums of at most 100 float32 products of size 1: 100 * 2**-24, with room for exp and log.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
# The same in float64.
FLOAT64 = {"atol": 1e-13, "rtol": 1e-13}


def loop(case: Case, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MoBA one query at a time, in Python numbers: out, lse and the chosen blocks."""
    blocks = -(-case.length // case.block)
    mask = case.key_mask()
    out = torch.zeros(*query.shape[:3], case.value_dim)
    lse = torch.full(query.shape[:3], -math.inf)
    chosen = torch.zeros(*query.shape[:3], blocks, dtype=torch.bool)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    for b in range(case.batch):
        for h in range(query.shape[1]):
            for i in range(case.queries):
                seen = case.length - case.queries + i + 1
                real = [j for j in range(seen) if mask is None or mask[b, j]]
                if not real:
                    continue
                q = query[b, h, i].tolist()
                k = [key[b, h // case.group, j].tolist() for j in real]
                v = [value[b, h // case.group, j].tolist() for j in real]
                picked = pick(case, q, k)
                chosen[b, h, i, list(picked)] = True
                keys = [r for r in range(len(real)) if r // case.block in picked]
                weights = [math.exp(scale * dot(q, k[r])) for r in keys]
                total = sum(weights)
                lse[b, h, i] = math.log(total)
                for d in range(case.value_dim):
                    mixed = sum(w * v[r][d] for w, r in zip(weights, keys, strict=True))
                    out[b, h, i, d] = mixed / total
    return out, lse, chosen


def pick(case: Case, query: list[float], keys: list[list[float]]) -> set[int]:
    """The blocks of a query whose own key is the last of `keys`."""
    own = (len(keys) - 1) // case.block
    if own < case.topk:
        return set(range(own + 1))
    picked = {own, *range(case.sinks)}
    score = {}
    for block in range(case.sinks, own):
        members = keys[block * case.block : (block + 1) * case.block]
        mean = [sum(column) / case.block for column in zip(*members, strict=True)]
        score[block] = dot(query, mean)
    while len(picked) < case.topk:
        best = max(score, key=lambda block: (score[block], -block))
        picked.add(best)
        del score[best]
    return picked


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


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
]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_the_reference_equals_a_loop_over_single_queries(case: Case) -> None:
    query, key, value = case.inputs()
    out, lse = reference.moba_attention(query, key, value, case.block, case.topk, **case.named())
    chosen = reference.select_blocks(
        query, key, case.block, case.topk, sinks=case.sinks, key_mask=case.key_mask()
    )
    expected_out, expected_lse, expected_chosen = loop(case, query, key, value)
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(out, expected_out, **FLOAT32)
    torch.testing.assert_close(lse, expected_lse, **FLOAT32)


@pytest.mark.parametrize(("topk", "sinks"), [(1, 0), (2, 0), (3, 0), (3, 2), (9, 0)])
def test_a_query_attends_topk_blocks_or_all_that_there_are(topk: int, sinks: int) -> None:
    case = Case(length=60, queries=60, topk=topk, sinks=sinks)
    query, key, _ = case.inputs()
    chosen = reference.select_blocks(query, key, case.block, topk, sinks=sinks)
    own = torch.arange(60) // case.block
    assert torch.equal(chosen.sum(-1), (own + 1).clamp(max=topk).expand(2, 4, 60))
    index = torch.arange(chosen.shape[-1])
    assert chosen.gather(-1, own[:, None].expand(2, 4, 60, 1)).all()
    assert not (chosen & (index > own[:, None])).any()
    assert chosen[:, :, sinks * case.block :, :sinks].all()


def test_equal_scores_go_to_the_lower_block_and_a_better_one_still_wins() -> None:
    query = torch.ones(1, 1, 48, 4)
    key = torch.ones(1, 1, 48, 4)
    chosen = reference.select_blocks(query, key, 8, 3)
    assert chosen[0, 0, 47].tolist() == [True, True, False, False, False, True]
    key[0, 0, 24:32] += 2**-20
    chosen = reference.select_blocks(query, key, 8, 3)
    assert chosen[0, 0, 47].tolist() == [True, False, False, True, False, True]


def test_the_gate_does_not_round_a_mean_to_the_keys_dtype() -> None:
    # Block 1 has mean 1 + 2**-8, which bfloat16 would round to 1, the mean of block 0: a tie.
    key = torch.tensor([1, 1, 1, 1 + 2**-7, 0, 0]).view(1, 1, 6, 1).bfloat16()
    chosen = reference.select_blocks(torch.ones_like(key), key, 2, 2)
    assert chosen[0, 0, 5].tolist() == [False, True, True]


def test_the_softmax_scale_does_not_change_the_choice() -> None:
    case = Case()
    query, key, _ = case.inputs()
    negative = reference.moba_attention(query, key, key, 8, 2, scale=-1.0)[1]
    visible = reference.select_blocks(query, key, 8, 2)
    keys = visible.repeat_interleave(8, -1) & torch.ones(40, 40, dtype=torch.bool).tril()
    score = -(query @ key.repeat_interleave(2, 1).mT)
    expected = score.masked_fill(~keys, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(negative, expected, **FLOAT32)


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize(("length", "queries"), [(40, 40), (33, 33), (40, 7), (3, 3)])
def test_enough_blocks_make_it_dense_attention(length: int, queries: int, sinks: int) -> None:
    case = Case(length=length, queries=queries, topk=5, sinks=sinks)
    query, key, value = (tensor.double() for tensor in case.inputs())
    out, lse = reference.moba_attention(query, key, value, 8, 5, sinks=sinks)
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(out, dense, **FLOAT64)
    score = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    expected = score.masked_fill(~causal, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected, **FLOAT64)


def test_topk_one_is_block_diagonal_attention() -> None:
    query, key, value = (tensor.double() for tensor in Case(topk=1).inputs())
    out, _ = reference.moba_attention(query, key, value, 8, 1)
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
    out, lse = reference.moba_attention(query, key, value, 8, 2)
    turned = reference.moba_attention(query[:, heads], key[:, turn], value[:, turn], 8, 2)
    assert torch.equal(turned[0], out[:, heads])
    assert torch.equal(turned[1], lse[:, heads])


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_never_changes_a_real_tokens_output(padding: str) -> None:
    case = Case(padding=padding, topk=3, sinks=1)
    query, key, value = case.inputs()
    out, lse = reference.moba_attention(query, key, value, 8, 3, **case.named())
    mask = case.key_mask()
    assert mask is not None
    for row, real in enumerate(mask):
        alone = [tensor[row : row + 1, :, real] for tensor in (query, key, value)]
        expected = reference.moba_attention(*alone, 8, 3, sinks=1)
        torch.testing.assert_close(out[row : row + 1, :, real], expected[0], **FLOAT32)
        torch.testing.assert_close(lse[row : row + 1, :, real], expected[1], **FLOAT32)


@pytest.mark.parametrize("queries", [1, 8, 11, 39])
def test_fewer_queries_than_keys_give_the_last_rows(queries: int) -> None:
    query, key, value = Case().inputs()
    out, lse = reference.moba_attention(query, key, value, 8, 2)
    last = reference.moba_attention(query[:, :, -queries:], key, value, 8, 2)
    torch.testing.assert_close(last[0], out[:, :, -queries:], **FLOAT32)
    torch.testing.assert_close(last[1], lse[:, :, -queries:], **FLOAT32)


def test_a_query_without_a_real_key_gives_zero_and_takes_no_gradient() -> None:
    case = Case(padding="one row empty")
    leaves = [tensor.requires_grad_() for tensor in case.inputs()]
    out, lse = reference.moba_attention(*leaves, 8, 2, **case.named())
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
]


@pytest.mark.parametrize(
    "case", [case for _, case in GRADIENTS], ids=[name for name, _ in GRADIENTS]
)
def test_gradients_of_the_reference_are_derivatives(case: Case) -> None:
    case = case.but(batch=1, length=10, queries=min(case.queries, 10), block=2, dim=2, value_dim=3)
    # Off the grid: a finite difference of 1e-6 must not step over a tie of the gate.
    shapes = [tensor.shape for tensor in case.inputs()]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    seen = torch.ones(case.queries, dtype=torch.bool)
    mask = case.key_mask()
    if mask is not None:
        seen = mask[0].cumsum(0)[-case.queries :] > 0

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.moba_attention(*inputs, case.block, case.topk, **case.named())
        return out, lse[:, :, seen]  # -inf has no derivative

    assert torch.autograd.gradcheck(function, leaves)
