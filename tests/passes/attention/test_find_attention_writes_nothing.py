"""find_attention leaves a canonical graph as it is: the same nodes, in order, and the same text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.capture.exported_program import capture_exported
from moonfx.passes.attention import canonicalize, find_attention
from moonfx.passes.context import Context
from tests.passes.attention.forms import SCALE, B, D, H, N, causal, inputs
from tests.support.zoo import build, logits

Body = Callable[..., Any]


def is_left_as_it_is(gm: fx.GraphModule) -> list[str]:
    """The forms found in a graph that find_attention did not change."""
    context = Context(gm, lambda site, sites, root: "dense")
    for each in context.graphs():
        canonicalize.run(each.graph, context)
    before = [(list(x.graph.nodes), str(x.graph), _users(x.graph)) for x in context.graphs()]
    for each in context.graphs():
        find_attention.run(each.graph, context)
    after = [(list(x.graph.nodes), str(x.graph), _users(x.graph)) for x in context.graphs()]
    assert after == before
    return [site.form for site in context.sites]


def _users(graph: fx.Graph) -> list[list[fx.Node]]:
    return [list(node.users) for node in graph.nodes]


ZOO = [
    (name, form)
    for name in ("llama", "qwen3", "gpt2", "gpt_neox", "falcon_gqa", "bloom", "nano", "mha")
    for form in ("eager", "sdpa")
    if (name, form) != ("bloom", "sdpa")  # which there is not
]


@pytest.mark.parametrize(("name", "form"), ZOO, ids=["-".join(x) for x in ZOO])
def test_on_a_model_of_the_zoo(name: str, form: str) -> None:
    model, ids = build(name, form), torch.arange(2, 34).repeat(2, 1)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.model, ids)

    with torch.no_grad():
        exported = torch.export.export(Logits(), (ids,), strict=False)
    assert len(is_left_as_it_is(capture_exported(exported).gm)) == 2


def attend(s: Tensor, v: Tensor) -> Tensor:
    return (s * SCALE).masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(~causal(), -torch.inf)
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s *= SCALE
    s -= torch.where(causal(), 0.0, torch.inf)
    return s.softmax(-1) @ v


def cut_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, 2, H // 2, N, D)
    return attend(q @ k[:, :2, None].transpose(-2, -1), v[:, :2, None]).flatten(1, 2)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2, None].repeat(1, 1, 2, 1, 1).flatten(1, 2).permute(0, 1, 2, 3) for x in (k, v))
    return attend(q @ k.transpose(-2, -1), v)


def heads_in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    return attend(torch.bmm(q, k.transpose(1, 2)).view(B, H, N, N), v)


def one_row_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:1], v[:1], is_causal=True)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-2, -1) * SCALE).masked_fill(~causal(), -torch.inf)
    column = torch.zeros(1, 1, 1, 1).expand(B, H, N, 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v


def taken_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


FORMS: list[tuple[Body, str]] = [
    (by_einsum, "einsum + softmax"),
    (in_place, "matmul + softmax"),
    (cut_heads, "matmul + softmax"),
    (repeated, "matmul + softmax"),
    (heads_in_batch, "bmm + softmax"),
    (one_row_of_keys, "sdpa"),
    (with_sinks, "matmul + softmax"),
    (taken_apart, "scaled_dot_product_flash_attention_for_cpu"),
]


@pytest.mark.parametrize(("body", "form"), FORMS, ids=[f[0].__name__ for f in FORMS])
def test_on_a_form_that_it_used_to_take_views_for(body: Body, form: str) -> None:
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(*inputs())
    assert is_left_as_it_is(gm) == [form]
