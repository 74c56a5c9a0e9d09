"""What is always legal is written in one way; look-alikes stay; numbers are kept bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.passes.attention import canonicalize
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import operator_name
from tests.passes.attention.forms import NEG, SCALE, B, H, N, captured, causal, inputs

Body = Callable[..., Any]
OPERATORS = (
    *("einsum", "matmul", "bmm", "add", "add_", "sub", "sub_", "mul", "mul_", "neg", "amax"),
    *("masked_fill", "masked_fill_"),
)


def operators(graph: fx.Graph) -> list[str]:
    """The names of the calls that a row is about, in order; not of what makes a mask [N, N]."""
    calls = [n for n in graph.nodes if n.op == "call_function" and operator_name(n) in OPERATORS]
    return [
        operator_name(n) for n in calls if operator_name(n) == "neg" or n.meta["val"].dim() == 4
    ]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def hidden() -> Tensor:
    return torch.where(causal(), 0.0, -NEG)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v)


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) - hidden()).softmax(-1) @ v


def integers_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lowest = torch.full((N,), torch.iinfo(torch.int64).min)
    return (scores(q, k) - lowest).softmax(-1) @ v


def subtracted_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s -= hidden()
    return s.softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).mul_(SCALE).add_(-hidden()).softmax(-1) @ v


def in_place_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, N, N)
    return s.masked_fill_(~causal(), NEG).softmax(-1) @ v


def in_place_after_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    peak = s.detach().amax(-1, keepdim=True)
    return s.mul_(SCALE).softmax(-1) @ v, peak


def with_a_dead_reader(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    p * 2
    return p @ v


ROWS: list[tuple[str, Body, list[str]]] = [
    ("einsum", by_einsum, ["matmul", "mul", "matmul"]),
    ("subtracted", subtracted, ["matmul", "neg", "add", "matmul"]),
    ("integers subtracted", integers_subtracted, ["matmul", "neg", "add", "matmul"]),
    ("subtracted in place", subtracted_in_place, ["matmul", "neg", "add", "matmul"]),
    ("in place", in_place, ["matmul", "mul", "neg", "add", "matmul"]),
    ("in place through a view", in_place_through_a_view, ["masked_fill", "matmul"]),
    ("in place after a reader", in_place_after_the_maximum, ["matmul", "amax", "mul", "matmul"]),
    ("a dead reader", with_a_dead_reader, ["matmul", "matmul"]),
]


def canonical(gm: fx.GraphModule) -> int:
    context = Context(gm, lambda site, sites, root: "dense")
    return canonicalize.run(gm.graph, context)


def results(gm: fx.GraphModule) -> list[Tensor]:
    gm.recompile()
    out = gm(*inputs())
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(
    ("body", "after"), [r[1:] for r in ROWS], ids=[r[0].replace(" ", "-") for r in ROWS]
)
def test_one_form_is_left_with_the_same_numbers(body: Body, after: list[str]) -> None:
    gm = captured(body)
    before = results(gm)
    canonical(gm)
    assert operators(gm.graph) == after
    gm.graph.lint()
    for got, wanted in zip(results(gm), before, strict=True):
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)
    assert canonical(gm) == 0


def product_of_no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k).sigmoid() @ v


def outer_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bij", q, k).softmax(-1) @ v[:, 0]


def maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-1, keepdim=True)).softmax(-1) @ v


def scaled_and_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sub(scores(q, k), hidden(), alpha=2).softmax(-1) @ v


def subtracted_from(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (hidden() - scores(q, k)).softmax(-1) @ v


def subtracted_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q - k, k).softmax(-1) @ v


def read_after_the_write(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    by_another_name = torch.ops.aten.alias(s)
    return s.mul_(SCALE).softmax(-1) @ v, by_another_name + 1


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    by_another_name = torch.ops.aten.alias(s)
    return s.mul_(SCALE).softmax(-1) @ v, by_another_name


def read_after_the_write_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    first = s[:, :1]
    return s.mul_(SCALE).softmax(-1) @ v, first + 1


def query_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q.mul_(SCALE), k).softmax(-1) @ v


def stays_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q.half(), k.half())
    s += causal().float()
    return (s.softmax(-1) @ v.half()).float()


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


STAY: list[tuple[str, Body]] = [
    ("einsum and no softmax", product_of_no_attention),
    ("einsum that sums twice", outer_product),
    ("the maximum subtracted", maximum_subtracted),
    ("subtracted with alpha", scaled_and_subtracted),
    ("scores subtracted", subtracted_from),
    ("subtracted before the scores", subtracted_elsewhere),
    ("read after the write", read_after_the_write),
    ("returned", returned),
    ("read after the write through a view", read_after_the_write_through_a_view),
    ("the query in place", query_in_place),
    ("a result that in place alone is half", stays_half),
    ("one operator", fused),
]


@pytest.mark.parametrize("body", [r[1] for r in STAY], ids=[r[0].replace(" ", "-") for r in STAY])
def test_look_alikes_stay(body: Body) -> None:
    gm = captured(body)
    gm.graph.eliminate_dead_code()
    text = str(gm.graph)
    assert canonical(gm) == 0
    assert str(gm.graph) == text


def test_the_first_of_several_results_is_taken_once() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return both[0] + both[0].sum(-1, keepdim=True)

    graph = captured(body).graph
    (node,) = (n for n in graph.nodes if "flash" in str(n.target))
    taken = next(n for n in node.users if n.args[1] == 0)
    with graph.inserting_after(taken):
        again = graph.node_copy(taken, lambda n: n)
    next(n for n in graph.nodes if operator_name(n) == "sum").replace_input_with(taken, again)
    gm = fx.GraphModule({}, graph)
    before = results(gm)
    assert canonical(gm) == 1
    assert [u.args[1] for u in node.users if u.users] == [0]
    for got, wanted in zip(results(gm), before, strict=True):
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)
