"""What was proved of a mask is written as the operator's operands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.attention.mask_operands import LOWEST_BIAS
from moonfx.passes.attention.sparsify_attention import OPERATOR
from moonfx.passes.graph.nodes import operator_name
from tests.passes.attention.forms import (
    NEG,
    SCALE,
    B,
    D,
    H,
    Model,
    N,
    causal,
    hidden,
    inputs,
    outcome,
    rewritten,
    run,
)
from tests.passes.attention.lookalikes import scores


def test_a_mask_of_padding_is_read_where_heads_lie_in_the_batch() -> None:
    """nn.MultiheadAttention's form: the padding of row b * H + h is that of row b."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
        keep = real.view(B, 1, 1, N).expand(-1, H, -1, -1).reshape(B * H, 1, N) & causal()
        s = torch.bmm(q, k.transpose(1, 2)) * SCALE
        return torch.bmm(s.masked_fill(~keep, NEG).softmax(-1), v).view(B, H, N, D)

    q, k, v = inputs()
    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :7] = False
    out, report = run(Model(body), q, k, v, real, block=4, topk=2)
    assert outcome(report) == ["causal & padding"]
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, key_mask=real))
    expected[1, :, :7] = v[1].mean(1, keepdim=True)  # of what is filled with one number
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_a_key_that_no_query_sees_counts_as_padding() -> None:
    """The mask has no input at all: every third key is hidden from all."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = causal() & (torch.arange(N) % 3 != 2)
        return F.scaled_dot_product_attention(q, k, v, keep)

    q, k, v = inputs()
    out, report = run(Model(body), q, k, v, block=4, topk=2)
    assert outcome(report) == ["causal & padding"]
    real = (torch.arange(N) % 3 != 2).expand(B, N)
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, key_mask=real))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 2], ids=["left by two", "right by one"])
def test_padding_of_the_whole_batch_is_not_taken_for_a_causal_mask(first: int) -> None:
    """A bool mask [B, N] may have the values of a causal one of B queries."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return hidden(scores(q, k)).masked_fill(~real[:, None, None], -torch.inf).softmax(-1) @ v

    real = torch.ones(B, N, dtype=torch.bool)
    real[:, :first] = False
    real[0, -1] = first > 0
    given = (*inputs(), real)
    dense = body(Model(body), *given)
    out, report = run(Model(body), *given)
    assert outcome(report) == ["causal & padding"]
    mine = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[mine], dense[mine], atol=2e-6, rtol=1e-5)


Attend = Callable[..., Any]


def masked_by(mask: Callable[[Tensor], Tensor]) -> Attend:
    """Attention of q, k, v with mask(given), made of its last input."""

    def body(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(given))

    return body


def operand(body: Attend, given: Tensor, name: str) -> fx.Node:
    """What is written as an operand of the one operator."""
    graph = rewritten(body, (*inputs(), given)).graph
    (call,) = (n for n in graph.nodes if n.target is OPERATOR)
    names = [a.name for a in OPERATOR._schema.arguments]
    node = call.args[names.index(name)]
    assert isinstance(node, fx.Node)
    return node


REAL = torch.ones(B, N, dtype=torch.bool)


def test_a_mask_that_the_graph_holds_is_taken_as_it_is() -> None:
    node = operand(masked_by(lambda real: causal() & real[:, None, None]), REAL, "key_mask")
    assert node.op == "placeholder"


def test_padding_by_number_is_compared_once_for_each_row_and_key() -> None:
    given = torch.ones(B, N, dtype=torch.int64)
    node = operand(masked_by(lambda ids: causal() & (ids != 7)[:, None, None]), given, "key_mask")
    assert (operator_name(node), node.args[1], node.meta["val"].shape) == ("ne", 7, (B, N))
    assert node.args[0].op == "placeholder"  # type: ignore[union-attr]


def test_a_mask_of_one_row_is_written_for_every_row() -> None:
    node = operand(masked_by(lambda real: causal() & real[:1, None, None]), REAL, "key_mask")
    assert (node.meta["val"].dtype, node.meta["val"].shape) == (torch.bool, (B, N))


def test_packed_sequences_are_told_apart_by_the_graphs_own_numbers() -> None:
    ids = torch.zeros(B, N, dtype=torch.int64)
    same = lambda ids: causal() & (ids[:, None, :, None] == ids[:, None, None])  # noqa: E731
    assert operand(masked_by(same), ids, "segments").op == "placeholder"


def test_a_bias_of_keys_is_float32_by_row_head_and_key_and_never_minus_infinity() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return hidden(q @ k.mT * SCALE + bias[:, None, None]).softmax(-1) @ v

    node = operand(body, torch.zeros(B, N), "key_bias")
    assert (node.meta["val"].dtype, node.meta["val"].shape) == (torch.float32, (B, 1, N))
    assert (operator_name(node), node.args[1]) == ("clamp", LOWEST_BIAS)


def test_layers_with_one_mask_share_what_is_written_of_it() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask = causal() & (ids != 7)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return F.scaled_dot_product_attention(y, k, v, mask)

    graph = rewritten(body, (*inputs(), torch.ones(B, N, dtype=torch.int64))).graph
    calls = [n for n in graph.nodes if n.target is OPERATOR]
    assert len(calls) == 2
    assert calls[0].args[7] is calls[1].args[7]
    assert [operator_name(n) for n in graph.nodes].count("ne") == 1


FIRST_ROWS = [
    # name, which keys a query may see by the rows of its batch, mask, the operator's argument
    ("padding", lambda own: own.bool()[:, None, None], "causal & padding", "key_mask"),
    (
        "segments",
        lambda own: own[:, None, :, None] == own[:, None, None],
        "causal & packed",
        "segments",
    ),
]


@pytest.mark.parametrize(
    ("same", "mask", "name"), [r[1:] for r in FIRST_ROWS], ids=[r[0] for r in FIRST_ROWS]
)
def test_a_mask_may_be_the_first_rows_of_a_larger_tensor(same, mask, name) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, causal() & same(table[: len(q)]))

    q, k, v = inputs()
    table = torch.arange(N).ge(torch.tensor([[0], [7], [9]])).long()
    out, report = run(Model(body), q, k, v, table, block=4, topk=2)
    assert outcome(report) == [mask]
    own = table[:2].bool() if name == "key_mask" else table[:2]
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, **{name: own}))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
