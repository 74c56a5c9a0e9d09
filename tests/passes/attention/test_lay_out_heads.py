"""Heads in every place: repeated for their group, cut in two, in the batch, among the tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import SCALE, B, D, H, Model, N, causal, check_form, inputs, run

G, X = 2, 2  # group, key heads


def weights(s: Tensor) -> Tensor:
    return (s * SCALE).masked_fill(~causal(), -torch.inf).softmax(-1)


def repeated(repeat: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(q @ repeat(k).transpose(-2, -1)) @ repeat(v)

    return body


def repeated_sdpa(repeat: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    return body


def by_tokens(x: Tensor) -> Tensor:
    """Llama's first repeat_kv: [B, N, Hkv, D] -> [B, N, Hq, D], then transposed."""
    x = x.transpose(1, 2)
    return x[:, :, :, None].expand(B, N, X, G, D).reshape(B, N, H, D).transpose(1, 2)


def sdpa_gqa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def grouped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, X, G, N, D)
    return (weights(q @ k[:, :, None].transpose(-2, -1)) @ v[:, :, None]).flatten(1, 2)


def grouped_expanded(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.view(B, X, G, N, D), *(x[:, :, None].expand(B, X, G, N, D) for x in (k, v))
    return (weights(q @ k.transpose(-2, -1)) @ v).flatten(1, 2)


GROUPED = [
    ("repeat", repeated(lambda x: x[:, :, None].repeat(1, 1, G, 1, 1).flatten(1, 2)), "matmul"),
    ("stack", repeated(lambda x: torch.stack([x] * G, 2).reshape(B, H, N, D)), "matmul"),
    ("by tokens", repeated(by_tokens), "matmul"),
    (
        "interleaved tokens",
        repeated(lambda x: x.transpose(1, 2).repeat_interleave(G, 2).permute(0, 2, 1, 3)),
        "matmul",
    ),
    ("sdpa, by tokens", repeated_sdpa(by_tokens), "sdpa"),
    ("sdpa, enable_gqa", sdpa_gqa, "sdpa"),
    ("5-D", grouped, "matmul"),
    ("5-D, expanded", grouped_expanded, "matmul"),
]


@pytest.mark.parametrize(
    ("body", "form"), [g[1:] for g in GROUPED], ids=[g[0].replace(" ", "-") for g in GROUPED]
)
def test_a_group_shares_its_keys(body: Callable[..., Any], form: str) -> None:
    form = form if form == "sdpa" else f"{form} + softmax"
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form=form, heads=(H, X), kv_heads=X)


def test_a_bias_is_scaled_where_heads_are_cut_in_two_as_where_they_are_not() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.view(B, X, G, N, D) @ k[:, :, None].transpose(-2, -1) * SCALE
        s = (s + 0.1 * torch.arange(N).view(1, 1, 1, 1, N)) * 2
        s = s.masked_fill(~causal(), -torch.inf)
        return (s.softmax(-1) @ v[:, :, None]).flatten(1, 2)

    q, k, v = inputs()
    k, v = k[:, :X], v[:, :X]
    out, report = run(Model(body), q, k, v)
    assert [r.action for r in report.rows] == ["sparse"]
    torch.testing.assert_close(out, body(Model(body), q, k, v), atol=5e-6, rtol=1e-4)


def one_expanded(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q @ k.expand(B, H, N, D).transpose(-2, -1)) @ v.expand(B, H, N, D)


def one_broadcast(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q @ k.transpose(-2, -1)) @ v


def one_joined(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.cat([x] * H, dim=1) for x in (k, v))
    return weights(q @ k.transpose(-2, -1)) @ v


def one_einsum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = weights(torch.einsum("b h i d, b j d -> b h i j", q, k[:, 0]))
    return torch.einsum("b h i j, b j d -> b h i d", p, v[:, 0])


def one_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "body",
    [one_expanded, one_broadcast, one_joined, one_einsum, one_sdpa],
    ids=lambda b: b.__name__,
)
def test_one_key_head_serves_all(body: Callable[..., Any]) -> None:
    form = {one_sdpa: "sdpa", one_einsum: "einsum + softmax"}.get(body, "matmul + softmax")
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form=form, heads=(H, 1), kv_heads=1)


def keys_of_one_row(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys [1, H, N, D] for every row of the batch."""
    return F.scaled_dot_product_attention(q, k[:1], v[:1], is_causal=True)


def two_halves(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepSeek's form: a part without and a part with rotary embedding, keys' part shared."""
    q = torch.cat([q, q], -1)
    k = torch.cat([k, k], -1)
    return weights(q @ k.transpose(-2, -1)) @ v


def test_keys_of_one_row_serve_every_row() -> None:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:1].expand(B, H, N, D).contiguous() for x in (k, v))
        return moba_attention(q, k, v, MobaArguments(4, 2))[0]

    check_form(keys_of_one_row, expected, form="sdpa")


def test_keys_may_be_wider_than_values() -> None:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.cat([q, q], -1), torch.cat([k, k], -1)
        return moba_attention(q, k, v, MobaArguments(4, 2, scale=SCALE))[0]

    check_form(two_halves, expected, form="matmul + softmax")


def two_in_a_row(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(first, k, v, is_causal=True)


def two_of_cut_heads(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(B, 2, H // 2, N, D) for x in (q, k, v))
    first = weights(q @ k.transpose(-2, -1)) @ v
    return (weights(first @ k.transpose(-2, -1)) @ v).flatten(1, 2)


@pytest.mark.parametrize("body", [two_in_a_row, two_of_cut_heads])
def test_an_attention_reads_the_one_before_as_it_became(body: Callable[..., Any]) -> None:
    q, k, v = inputs()
    out, report = run(Model(body), q, k, v, block=4, topk=2)
    assert [r.action for r in report.rows] == ["sparse", "sparse"]
    first = moba_attention(q, k, v, MobaArguments(4, 2))[0]
    expected = moba_attention(first, k, v, MobaArguments(4, 2))[0]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
