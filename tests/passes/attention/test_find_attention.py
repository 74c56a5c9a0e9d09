"""Forms of attention that are right and must be found: equal to dense, and to the reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs, outcome, run


def plain(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) * SCALE
    return s.masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def divided(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.matmul(q, k.mT) / math.sqrt(D)
    return torch.matmul(F.softmax(s.masked_fill(~causal(), -1e9), dim=-1), v)


def query_scaled_first(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q * SCALE) @ k.transpose(2, 3)
    return torch.where(causal(), s, NEG).softmax(3) @ v


def both_scaled(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q * D**-0.25) @ (k * D**-0.25).transpose(2, 3)
    return torch.where(causal(), s, NEG).softmax(3) @ v


def where_commuted(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.swapaxes(-1, -2) * SCALE
    return torch.where(~causal(), torch.full_like(s, -torch.inf), s).softmax(-1) @ v


def mask_plus_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(N, N).masked_fill(~causal(), NEG)
    return (mask + q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def scale_times_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = SCALE * (q @ k.transpose(-2, -1)) + torch.triu(torch.full((N, N), -torch.inf), diagonal=1)
    return s.softmax(-1) @ v


def times_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-1's: 0 where it is hidden, and -1e4 more."""
    mask = causal().to(torch.float32)
    s = (q @ k.transpose(-2, -1)) * SCALE
    return (s * mask + -1e4 * (1 - mask)).softmax(-1) @ v


def float_mask_from_bool(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1.0 - causal().to(torch.float32)) * NEG
    return (q @ k.transpose(-2, -1) * SCALE + mask[None, None]).softmax(-1) @ v


def in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s /= math.sqrt(D)
    return s.masked_fill_(~causal(), -torch.inf).softmax(-1) @ v


def in_place_result_dropped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s.mul_(SCALE)
    s.masked_fill_(~causal(), -torch.inf)
    return s.softmax(-1) @ v


def constant_tensor_scale(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) / torch.full([], D**0.5)
    return s.masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def buffer_scale(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) * self.scale
    return s.masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def tril_buffer(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    s = q @ k.transpose(-2, -1) * SCALE
    s = s.masked_fill(self.bias[:, :, :n, :n] == 0, -torch.inf)
    return F.dropout(s.softmax(-1), 0.1, training=False) @ v


def batched(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    s = torch.baddbmm(
        torch.zeros(1, 1, N).masked_fill(~causal(), NEG), q, k.transpose(1, 2), alpha=SCALE
    )
    return torch.bmm(s.softmax(-1), v).view(B, H, N, D)


def batched_beta_zero(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    s = torch.baddbmm(torch.empty(B * H, N, N), q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(s.masked_fill(~causal(), NEG).softmax(-1), v).view(B, H, N, D)


def batched_with_views(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The older Hugging Face form: scores viewed by head for the mask, and back."""
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    s = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, N, N)
    s = s + torch.zeros(N, N).masked_fill(~causal(), NEG)[None, None]
    return torch.bmm(s.view(B * H, N, N).softmax(-1), v).view(B, H, N, D)


def permuted_keys(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """K = Linear.view(b, t, H, D).permute(0, 2, 3, 1): pytorch#195320, #195282."""
    stored = k.transpose(1, 2).contiguous()
    s = q @ stored.view(q.shape[0], q.shape[2], H, D).permute(0, 2, 3, 1) * SCALE
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return s.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_bool(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal())


def sdpa_float(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(), 0.0, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)


def sdpa_mask_made_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((N, N), -torch.inf).triu_(diagonal=1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def sdpa_mask_filled_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(N, N, dtype=torch.bool).triu_(1)
    mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask)


FORMS: list[tuple[Callable[..., Any], str]] = [
    (plain, "matmul + softmax"),
    (divided, "matmul + softmax"),
    (query_scaled_first, "matmul + softmax"),
    (both_scaled, "matmul + softmax"),
    (where_commuted, "matmul + softmax"),
    (mask_plus_scores, "matmul + softmax"),
    (scale_times_scores, "matmul + softmax"),
    (times_the_mask, "matmul + softmax"),
    (float_mask_from_bool, "matmul + softmax"),
    (in_place, "matmul + softmax"),
    (in_place_result_dropped, "matmul + softmax"),
    (constant_tensor_scale, "matmul + softmax"),
    (buffer_scale, "matmul + softmax"),
    (tril_buffer, "matmul + softmax"),
    (batched, "baddbmm + softmax"),
    (batched_beta_zero, "baddbmm + softmax"),
    (batched_with_views, "bmm + softmax"),
    (permuted_keys, "matmul + softmax"),
    (sdpa, "sdpa"),
    (sdpa_bool, "sdpa"),
    (sdpa_float, "sdpa"),
    (sdpa_mask_made_in_place, "sdpa"),
    (sdpa_mask_filled_in_place, "sdpa"),
]


def model_of(body: Callable[..., Any]) -> Model:
    ones = torch.ones(1, 1, 2 * N, 2 * N)
    return Model(body, bias=ones.tril(), scale=torch.tensor(SCALE))


@pytest.mark.parametrize(("body", "form"), FORMS, ids=[f[0].__name__ for f in FORMS])
def test_right_attention_is_found_and_becomes_the_reference(
    body: Callable[..., Any], form: str
) -> None:
    q, k, v = inputs()
    model = model_of(body)
    dense = model(q, k, v)
    full, report = run(model, q, k, v)
    assert [(r.form, r.mask, r.action) for r in report.rows] == [(form, "causal", "sparse")]
    # The same sums in another order, in float32.
    torch.testing.assert_close(full, dense, atol=2e-6, rtol=1e-5)
    sparse, _ = run(model, q, k, v, block=4, topk=2)
    if body is both_scaled:  # the keys that are attended are the scaled ones: same order of blocks
        k, q = k * D**-0.25, q * D**-0.25
        expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, scale=1.0))
    else:
        expected, _ = moba_attention(q, k, v, MobaArguments(4, 2))
    torch.testing.assert_close(sparse, expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_a_softmax_in_float32_of_bfloat16_scores_is_attention() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(2, 3) * SCALE
        mask = torch.zeros(N, N, dtype=q.dtype).masked_fill(~causal(), torch.finfo(q.dtype).min)
        return F.softmax(s + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    q, k, v = inputs(dtype=torch.bfloat16)
    out, report = run(Model(body), q, k, v, block=4, topk=2)
    assert outcome(report) == ["causal"]
    assert out.dtype == torch.bfloat16
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2))
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)  # bfloat16: 8 bits


@pytest.mark.parametrize("value", [-1e9, -1e5, NEG, -torch.inf])
@pytest.mark.parametrize("how", ["masked_fill", "where", "additive"])
def test_every_customary_mask_value_hides(value: float, how: str) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(2, 3) * SCALE
        if how == "masked_fill":
            s = s.masked_fill(~causal(), value)
        elif how == "where":
            s = torch.where(causal(), s, value)
        else:
            s = s + torch.where(causal(), 0.0, value)
        return s.softmax(-1) @ v

    q, k, v = inputs()
    out, report = run(Model(body), q, k, v)
    assert outcome(report) == ["causal"]
    torch.testing.assert_close(out, sdpa(Model(body), q, k, v), atol=2e-6, rtol=1e-5)


def test_gradients_flow_through_every_form_as_in_dense_attention() -> None:
    for body in (plain, in_place, batched_with_views, sdpa_float):
        grads = []
        for make in (lambda m, *x: m(*x), lambda m, *x: run(m, *x)[0]):
            leaves = [x.requires_grad_() for x in inputs()]
            make(model_of(body), *leaves).square().sum().backward()
            grads.append([x.grad for x in leaves])
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
