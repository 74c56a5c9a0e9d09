"""Graphs that look like causal attention and are not, or not provably: declined, left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs, outcome, run


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.masked_fill(~causal(s.shape[-2], s.shape[-1]), -torch.inf).softmax(-1) @ v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


Body = Callable[..., Any]
Row = tuple[str, Body, str | None]


def softmax_over(dim: int) -> Body:
    """pytorch#196468: Inductor 2.13 rewrites both."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~causal(), NEG).softmax(dim) @ v

    return body


def keys_as_they_are(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.cat([q, q, q], -1)  # head_dim == N: the product exists without a transpose
    return attend(q @ torch.cat([k, k, k], -1) * SCALE, v)


def keys_transposed_twice(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.cat([q, q, q], -1)
    return attend(q @ torch.cat([k, k, k], -1).transpose(2, 3).transpose(2, 3) * SCALE, v)


def times_the_mask_alone(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * causal().float()).softmax(-1) @ v


def times_another_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(N)
    near = (index[:, None] - index[None, :] < 4).float()
    return attend(scores(q, k) * near, v)


def times_two_and_one(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k) * (1 + causal().float()), v)


def masked_then_times(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal().float()
    s = (scores(q, k) + 0.5 * mask) * mask
    return attend(s, v)


def less_max_then_times(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s = (s - s.amax(-1, keepdim=True)) * causal().float().roll(1, 0)
    return attend(s, v)


def probabilities_returned(self: Model, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return p @ v, p


def probabilities_reused(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return p @ v + p.sum(-1, keepdim=True)


def probabilities_as_values(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return p @ p


def probabilities_scaled(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).masked_fill(~causal(), NEG).softmax(-1) * 2.0) @ v


def changed(change: Callable[[Tensor], Tensor]) -> Body:
    """Probabilities that something is done to before they meet the values."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(scores(q, k).masked_fill(~causal(), NEG).softmax(-1)) @ v

    return body


def powers(power: Callable[[Tensor], Tensor]) -> Body:
    """Softmax in another base, or of another function."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = power(scores(q, k).masked_fill(~causal(), -1e9))
        return e / e.sum(-1, keepdim=True) @ v

    return body


def heads_in_the_batch_and_shared(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0], k[0, ::2], v[0, ::2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def scores_reused(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return attend(s, v) + s.mean(-1, keepdim=True)


def six_dimensions(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(1, (2, 2, 1)) for x in (q, k, v))
    return attend(scores(q, k), v).flatten(1, 3)


def five_dimensions_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1, 2)


def keys_by_one_group_values_by_another(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head (x, y) with key head x and value head y."""
    q = q.unflatten(1, (2, 2))
    return attend(scores(q, k[:, :2, None]), v[:, None, :2]).flatten(1, 2)


def mask_by_half_of_the_head(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    keep = torch.stack([causal(), causal() & (torch.arange(N) > 0)])  # [2, N, N]: by group
    s = scores(q, k[:, :2, None]).masked_fill(~keep, NEG)
    return (s.softmax(-1) @ v[:, :2, None]).flatten(1, 2)


def learned_bias(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k) + self.bias, v)


def learned_bias_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = self.bias.masked_fill(~causal(), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask)


def t5_bias(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = (torch.arange(N)[None] - torch.arange(N)[:, None]).clamp(-8, 8) + 8
    return attend(scores(q, k) + self.table[distance].permute(2, 0, 1)[None], v)


def squared_distance(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, H + 1)
    distance = torch.arange(N)[None] - torch.arange(N)[:, None]
    return attend(scores(q, k) + slopes[:, None, None] * distance**2, v)


def soft_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) + torch.where(causal(), 0.0, -3.0)).softmax(-1) @ v


def mask_scaled_away(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((scores(q, k) + torch.where(causal(), 0.0, -1e5)) * 1e-5).softmax(-1) @ v


def fill_scaled_away(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).masked_fill(~causal(), -1e5) / 1e5).softmax(-1) @ v


def mask_times_a_tensor(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (scores(q, k) + torch.where(causal(), 0.0, -1e5)) * v.mean()
    return s.softmax(-1) @ v


def filled_with(value: float) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~causal(), value).softmax(-1) @ v

    return body


def where_with_other_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(causal(), scores(q, k), q[..., :1]).softmax(-1) @ v


def masked_then_capped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tanh() of a masked score is -1: still seen."""
    return (torch.tanh(masked(q, k) / 5) * 5).softmax(-1) @ v


def added_then_capped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) + torch.where(causal(), 0.0, NEG)
    return (torch.tanh(s / 5) * 5).softmax(-1) @ v


def biased_then_capped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.tanh((scores(q, k) + 3.0) / 5) * 5, v)


def less_max_then_capped(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return attend(torch.tanh((s - s.amax(-1, keepdim=True)) / 5) * 5, v)


def capped_twice(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.tanh(torch.tanh(scores(q, k))), v)


def capped_by_a_tensor(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.tanh(scores(q, k)) * v.mean(), v)


def capped_by_head(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.tanh(scores(q, k)) * self.mix[0][:, None, None], v)


def capped_by_a_negative_number(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.tanh(scores(q, k) / -5) * -5, v)


def capped_by_another_function(function: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(function(scores(q, k) / 5) * 5, v)

    return body


def capped_and_reused(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    capped = torch.tanh(scores(q, k))
    return attend(capped * 5, v) + capped.mean(-1, keepdim=True)


def sunk(
    sink: Callable[[Model, Tensor, Tensor], Tensor],
    cut: Callable[[Tensor], Tensor] = lambda p: p[..., :-1],
    after: Callable[[Tensor], Tensor] = lambda s: s,
    before: Callable[[Tensor], Tensor] = lambda s: s,
) -> Body:
    """Attention with a column of scores beside the keys that is cut off the probabilities."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.cat([before(masked(q, k)), sink(self, q, k)], -1)
        return cut(after(s).softmax(-1)) @ v

    return body


def by_head(self: Model, q: Tensor, k: Tensor) -> Tensor:
    return self.sink.expand(B, H, N, 1)


def sink_with_a_value(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([masked(q, k), by_head(self, q, k)], -1)
    return s.softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def another_row_of_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([masked(q, k), self.bias[:, :, :1].expand(B, H, 1, N)], -2)
    return (s.softmax(-1) @ v)[:, :, :-1]


def talking_heads(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.einsum("bhij,hg->bgij", scores(q, k), self.mix), v)


def mixed_after(mix: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """Probabilities that are changed between the softmax and the values."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mix(masked(q, k).softmax(-1), self.mix) @ v

    return body


def by_distance(distance: Callable[[Tensor, Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(-distance(q, k) * SCALE, v)

    return body


def negative_scale(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k) * -1.0, v)


def negative_scale_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=-0.3)


def scale_by_head(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k) * self.mix[0][:, None, None], v)


def bidirectional(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def bidirectional_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def dropout(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return F.dropout(p, 0.5, training=True) @ v


def dropout_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)


def masked_by(make: Callable[[Model, Tensor, Tensor], Tensor], n: int = N) -> Body:
    """SDPA with a bool mask made of index rows i [n, 1] and columns j [1, N]."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(N)[None]
        return F.scaled_dot_product_attention(q[:, :, :n], k, v, make(self, i, j))

    return body


def changed_in_place(change: Callable[[Tensor], Any]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
        change(mask)
        return F.scaled_dot_product_attention(q, k, v, mask)

    return body


def changed_through_unbind(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
    mask.unbind(0)[3].fill_(True)
    return F.scaled_dot_product_attention(q, k, v, mask)


def built_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((N, N), -torch.inf).tril_(diagonal=-1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def read_then_changed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(N)[None] <= torch.arange(N)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out + F.scaled_dot_product_attention(q, k, v, mask.triu_())


def keys_changed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1.0
    s = scores(q, k)
    k.zero_()
    return attend(s, v) + k


def query_changed_through_a_view(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.0
    first, _ = q.split(N // 2, dim=2)
    s = scores(q, k)
    first.add_(1.0)
    return attend(s, v)


def chunks_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    segment = torch.arange(N) // 5
    keep = causal() & (segment[:, None] == segment[None])
    return F.scaled_dot_product_attention(q, k, v, keep)


def batch_made_by_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:1], k[:1], v[:1]
    s = scores(q, k).masked_fill(~causal().expand(B, 1, N, N), NEG)
    return s.softmax(-1) @ v


def rows_made_by_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (scores(q[:, :, :1], k) + torch.where(causal(), 0.0, NEG)).softmax(-1)
    return s @ v


def linear_attention(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.transpose(2, 3).softmax(-1) @ v)


def router(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q.transpose(1, 2).reshape(B * N, H * D)
    weight, _ = F.linear(x, self.gate).softmax(-1).topk(2)
    return (weight / weight.sum(-1, keepdim=True)).sum() * v


def loss(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q.transpose(1, 2).reshape(B * N, H * D) @ self.gate.T
    return -(logits.softmax(-1).log()[:, 0]).mean()


def masked(q: Tensor, k: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~causal(), NEG)


def detached_in_float32(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k).softmax(-1).double().detach().float() @ v


def less(peak: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return (s - peak(s)).softmax(-1) @ v

    return body


def less_max_of_others(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return attend(s - scores(k, q).amax(-1, keepdim=True), v)


def minus_twice_the_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) - torch.where(causal(), NEG, 0.0)).softmax(-1) @ v


def subtracted_from(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.where(causal(), 0.0, -torch.inf) - scores(q, k)).softmax(-1) @ v


def clamped(**limits: float) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k).clamp(**limits).softmax(-1) @ v

    return body


def no_less_than_zero(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.maximum(scores(q, k), torch.zeros(())), v)


def log_softmax_exp(dim: int) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k).log_softmax(dim).exp() @ v

    return body


def log_softmax_kept(self: Model, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = masked(q, k).log_softmax(-1)
    return p.exp() @ v, p


def exp_over(total: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / total(e)) @ v

    return body


def exp_divided_last_by_another_sum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = masked(q, k)
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return (e @ v) / (e.sum(-1, keepdim=True) + 1.0)


def exp_not_divided(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k).exp() @ v


def exp_of_logsumexp_over(dim: int) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return (s - s.logsumexp(dim, keepdim=True)).exp() @ v

    return body


def guarded(guard: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """Probabilities that are changed where a guard says so: guard(scores, probabilities)."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = masked(q, k)
        return guard(s, s.softmax(-1)) @ v

    return body


@torch.library.custom_op("moonfx_test::own_attention", mutates_args=())
def own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@own_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def mapped_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attend(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=True)

    return torch.vmap(attend)(q, k, v)


def mapped_by_hand(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows and heads are mapped over: the scores are [N, N] there."""
    one_head = lambda q, k, v: attend(q @ k.mT * SCALE, v)  # noqa: E731
    return torch.vmap(torch.vmap(one_head))(q, k, v)


def unknown_operator(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return own_attention(q, k, v)


def flash_for_cpu(**given: Any) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, is_causal=True, **{x: y for x, y in given.items() if x != "lse"})
        return out + lse[..., None] if "lse" in given else out

    return body


def exp_feature_map(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention: exp() of queries and keys, not of their product."""
    return q.exp() @ (k.exp().transpose(2, 3) @ v)


def log_likelihood(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Perplexity: exp() of scores that enters no product."""
    return scores(q, k).log_softmax(-1).mean().neg().exp() + v


NOT_CAUSAL = "the mask is not causal"
IN_PLACE = "the mask is written to in place"
BIAS = "additive bias"

LOOKALIKES: list[Row] = [
    ("softmax over the queries", softmax_over(-2), "softmax over dim -2 of 4"),
    ("softmax over the heads", softmax_over(1), "softmax over dim 1 of 4"),
    ("keys not transposed", keys_as_they_are, "the keys are not transposed"),
    ("keys transposed twice", keys_transposed_twice, "the keys are not transposed"),
    ("probabilities returned", probabilities_returned, "the probabilities are also used by"),
    ("probabilities reused", probabilities_reused, "the probabilities are also used by"),
    ("probabilities as values", probabilities_as_values, "the probabilities are also the values"),
    ("probabilities scaled", probabilities_scaled, "'mul' stands between the softmax and its"),
    ("probabilities, whole", changed(lambda p: p.to(torch.int32).float()), "'to' stands between"),
    (
        "probabilities, split",
        changed(lambda p: p.split([N, 0], -1)[0]),
        "'split_with_sizes' stands",
    ),
    ("probabilities, mean of heads", changed(lambda p: p.mean(1, True)), "'mean' stands between"),
    ("probabilities, squared", changed(lambda p: p**2), "'pow' stands between"),
    ("probabilities, rolled", changed(lambda p: p.roll(1, -1)), "'roll' stands between"),
    ("probabilities, some", changed(lambda p: p[..., torch.arange(N)]), "'index' stands between"),
    ("powers of 2", powers(torch.exp2), "written with exp2"),
    ("powers of 3", powers(lambda s: 3.0**s), "written with pow"),
    ("heads in the batch, shared", heads_in_the_batch_and_shared, "key has fewer heads than query"),
    ("scores reused", scores_reused, "the scores are used more than once"),
    ("6-D", six_dimensions, "query has 6 dimensions"),
    ("5-D sdpa", five_dimensions_sdpa, "query has 5 dimensions"),
    ("two groupings", keys_by_one_group_values_by_another, "shared by different groups of heads"),
    ("mask by half a head", mask_by_half_of_the_head, "cut in two differs by head"),
    ("learned bias", learned_bias, BIAS),
    ("learned bias, sdpa", learned_bias_sdpa, BIAS),
    ("T5 bias", t5_bias, BIAS),
    ("ALiBi of squares", squared_distance, BIAS),
    ("soft mask", soft_mask, BIAS),
    ("mask scaled away", mask_scaled_away, BIAS),
    ("fill scaled away", fill_scaled_away, "masked_fill() with a value that is no mask"),
    ("mask times a tensor", mask_times_a_tensor, "the mask is scaled after it was added"),
    ("filled with 0", filled_with(0.0), "masked_fill() with a value that is no mask"),
    ("filled with -5", filled_with(-5.0), "masked_fill() with a value that is no mask"),
    ("filled with +inf", filled_with(torch.inf), "masked_fill() with a value that is no mask"),
    ("filled with NaN", filled_with(torch.nan), "masked_fill() with a value that is no mask"),
    ("where two scores", where_with_other_scores, "where() fills in a value that is no mask"),
    ("masked, then capped", masked_then_capped, "the mask is put on before the softcap"),
    ("mask added, then capped", added_then_capped, "a mask or bias is added before the softcap"),
    ("bias, then softcap", biased_then_capped, "a mask or bias is added before the softcap"),
    ("max, then softcap", less_max_then_capped, "the maximum is subtracted before the softcap"),
    ("times the mask alone", times_the_mask_alone, "the scores are multiplied by a mask"),
    ("times another mask", times_another_mask, "the scores are multiplied by a mask"),
    ("times two and one", times_two_and_one, "the scores are scaled by a tensor"),
    ("bias, then times a mask", masked_then_times, "a mask or bias is added before"),
    ("max, then times a mask", less_max_then_times, "the maximum is subtracted before"),
    ("capped twice", capped_twice, "two softcaps"),
    ("softcap, a tensor", capped_by_a_tensor, "the softcap's size is not a constant"),
    ("softcap by head", capped_by_head, "the scores are scaled by a tensor"),
    ("softcap, negative", capped_by_a_negative_number, "the scores are scaled by -5.0"),
    ("sigmoid", capped_by_another_function(torch.sigmoid), "'sigmoid' stands between"),
    ("sin", capped_by_another_function(torch.sin), "'sin' stands between"),
    ("hardtanh", capped_by_another_function(F.hardtanh), "'hardtanh' stands between"),
    ("softcap reused", capped_and_reused, "the scores are used more than once"),
    ("sink, not cut off", sink_with_a_value, "and not cut off again"),
    ("sink, a key cut off", sunk(by_head, lambda p: p[..., 1:]), "come last, and another part"),
    ("sink by query", sunk(lambda m, q, k: q[..., :1]), "not proved to be one number per head"),
    ("sink by key", sunk(lambda m, q, k: m.bias[..., :1].expand(B, H, N, 1)), "not proved"),
    ("sink by row", sunk(lambda m, q, k: q[:, :, :1, :1].expand(B, H, N, 1)), "not proved"),
    (
        "two sinks",
        sunk(lambda m, q, k: m.sink.expand(B, H, N, 2), lambda p: p[..., :-2]),
        "more than one column",
    ),
    ("sink, then scaled", sunk(by_head, after=lambda s: s * 0.5), "before they are all done"),
    (
        "sink, then masked",
        sunk(by_head, after=lambda s: s.masked_fill(torch.arange(N + 1) > N, NEG)),
        "before they are all done",
    ),
    (
        "sink, then softcap",
        sunk(by_head, after=lambda s: 5 * torch.tanh(s / 5)),
        "before they are all done",
    ),
    (
        "max subtracted, then sink",
        sunk(by_head, before=lambda s: s - s.amax(-1, keepdim=True)),
        "the maximum is subtracted before attention sink logits",
    ),
    (
        "constant added, then sink",
        sunk(by_head, before=lambda s: s + 1.0),
        "a constant is added before attention sink logits",
    ),
    ("a row more", another_row_of_scores, "not along the keys"),
    ("a key cut off", guarded(lambda s, p: F.pad(p[..., 1:], (0, 1))), "stands between"),
    ("max over queries", less(lambda s: s.amax(-2, keepdim=True)), "is not one number per query"),
    ("max over heads", less(lambda s: s.amax(1, keepdim=True)), "is not one number per query"),
    ("max, dim lost", less(lambda s: s.amax((0, 1, 3))), "is not one number per query"),
    ("max, dim misplaced", less(lambda s: s.amax(-1)[:, :, None]), "is not one number per query"),
    ("max of others", less_max_of_others, "additive bias"),
    ("mask subtracted", minus_twice_the_mask, "additive bias"),
    ("subtracted from", subtracted_from, "the scores are subtracted from something"),
    ("clamped below", clamped(min=-50.0), "the scores are clamped at -50.0"),
    ("clamped above", clamped(max=2.0), "the scores are clamped at 2.0"),
    ("no less than 0", no_less_than_zero, "the scores are clamped at zeros"),
    ("talking heads", talking_heads, "einsum 'bhij,hg->bgij' is not query @ key^T"),
    (
        "talking heads, after",
        mixed_after(lambda p, mix: F.conv2d(p, mix[:, :, None, None])),
        "'conv2d' stands between the softmax and its product",
    ),
    (
        "talking heads, a linear",
        mixed_after(lambda p, mix: F.linear(p.movedim(1, 3), mix).movedim(3, 1)),
        "stands between the softmax and its product",
    ),
    ("squared", mixed_after(lambda p, mix: p.pow(2)), "'pow' stands between the softmax and its"),
    ("sharpened", mixed_after(lambda p, mix: F.normalize(p, p=1, dim=-1)), "stands between"),
    ("cdist", by_distance(torch.cdist), "the scores are a distance (cdist)"),
    (
        "cdist squared",
        by_distance(lambda q, k: torch.cdist(q, k) ** 2),
        "the scores are a distance",
    ),
    ("negative scale", negative_scale, "the scores are scaled by -1.0"),
    ("negative scale, sdpa", negative_scale_sdpa, "the scores are scaled by -0.3"),
    ("scale by head", scale_by_head, "the scores are scaled by a tensor"),
    ("bidirectional", bidirectional, "bidirectional: no mask and not causal"),
    ("bidirectional, sdpa", bidirectional_sdpa, "bidirectional: no mask and not causal"),
    ("dropout", dropout, "dropout p=0.5 is active"),
    ("dropout, sdpa", dropout_sdpa, "dropout p=0.5 is active"),
    ("strictly causal", masked_by(lambda m, i, j: j < i), "causal with offset -1"),
    ("one ahead", masked_by(lambda m, i, j: j <= i + 1), "causal with offset 1"),
    ("anti-causal", masked_by(lambda m, i, j: j >= i), "anti-causal"),
    ("triu of the wrong side", masked_by(lambda m, i, j: (i >= 0).expand(N, N).triu()), "anti-"),
    ("sliding", masked_by(lambda m, i, j: (j <= i) & (i - j < 5)), "sliding window of 5 tokens"),
    ("prefix", masked_by(lambda m, i, j: (j <= i) | (j < 6)), "prefix-LM: the keys of"),
    ("doubled", masked_by(lambda m, i, j: 2 * j <= i), "unsupported mask condition"),
    ("tokens shifted", masked_by(lambda m, i, j: (j <= i) & (j < 9)), "unsupported mask condition"),
    ("top-left, Nq < Nk", masked_by(lambda m, i, j: j <= i, 9), "causal with offset 0"),
    ("wrong offset, Nq < Nk", masked_by(lambda m, i, j: j <= i + 3, 9), "causal with offset 3"),
    ("chunks", chunks_sdpa, "chunked attention of 5 tokens"),
    ("packed by >=", masked_by(lambda m, i, j: (j <= i) & (m.row_id[i] >= m.row_id[j])), "packed"),
    (
        "packed, shifted",
        masked_by(lambda m, i, j: (j <= i) & (m.row_id[i] == m.row_id.roll(1)[j])),
        "packed sequences: queries and keys are compared by",
    ),
    ("mask in a buffer", masked_by(lambda m, i, j: m.holed), "of the mask 'holed' are not known"),
    ("mask by head", masked_by(lambda m, i, j: m.by_head & (j <= i)), "differs by head"),
    ("not a triangle", masked_by(lambda m, i, j: m.holed), "the values of the mask"),
    (
        "NaN is not NaN",
        masked_by(lambda m, i, j: (m.row != m.row) | (j <= i)),
        "prefix-LM: the keys of a prefix (by 'ne')",
    ),
    (
        "half-precision positions",
        masked_by(lambda m, i, j: j.half() <= i.half()),
        "the values of the mask 'le' are not known",
    ),
    (
        "masked_fill_",
        changed_in_place(lambda m: m.masked_fill_(torch.eye(N).bool(), 0)),
        "the values of",
    ),
    ("mask[:, 0] = False", changed_in_place(lambda m: m[:, 0].fill_(False)), IN_PLACE),
    ("mask[0] = True", changed_in_place(lambda m: m.__setitem__(0, True)), IN_PLACE),
    ("logical_not_", changed_in_place(lambda m: m.logical_not_()), "anti-causal"),
    ("changed through unbind", changed_through_unbind, IN_PLACE),
    ("triu_ of the wrong side", built_in_place, "anti-causal"),
    ("read before triu_", read_then_changed, IN_PLACE),
    ("keys changed", keys_changed, "key is written to in place"),
    ("query changed", query_changed_through_a_view, "query is written to in place"),
    ("batch made by the mask", batch_made_by_the_mask, "broadcast the query"),
    ("rows made by the mask", rows_made_by_the_mask, "broadcast the query"),
    ("detached", detached_in_float32, "the probabilities are detached"),
    ("log_softmax over queries", log_softmax_exp(-2), "softmax over dim -2 of 4"),
    ("log_softmax returned", log_softmax_kept, "the scores are used more than once"),
    ("exp over queries' sum", exp_over(lambda e: e.sum(-2, keepdim=True)), "softmax over dim -2"),
    ("exp over all", exp_over(lambda e: e.sum((-1, -2), keepdim=True)), "exp() and a sum is not"),
    ("exp over more", exp_over(lambda e: e.sum(-1, keepdim=True) + 1), "exp() and a sum is not"),
    ("exp over its max", exp_over(lambda e: e.amax(-1, keepdim=True)), "exp() and a sum is not"),
    ("exp, divided by more", exp_divided_last_by_another_sum, "not divided by that sum"),
    ("exp, not divided", exp_not_divided, "a softmax written with exp() and a sum is not read"),
    ("logsumexp over queries", exp_of_logsumexp_over(-2), "softmax over dim -2 of 4"),
    ("NaN to 1", guarded(lambda s, p: p.nan_to_num(1.0)), "nan_to_num(nan=1.0)"),
    (
        "NaN filled with 1",
        guarded(lambda s, p: p.masked_fill(p.isnan(), 1.0)),
        "filled with something other than 0",
    ),
    (
        "not NaN",
        guarded(lambda s, p: p.masked_fill(~p.isnan(), 0.0)),
        "set to 0 where they are not NaN",
    ),
    (
        "filled by another mask",
        guarded(lambda s, p: p.masked_fill(~causal().T, 0.0)),
        "set to 0 where the scores are not known to be masked",
    ),
    (
        "filled where seen",
        guarded(lambda s, p: torch.where(causal(), 0.0, p)),
        "set to 0 where the scores are not known to be masked",
    ),
    (
        "filled where any is hidden",
        guarded(lambda s, p: p.masked_fill((~causal()).any(-1, keepdim=True), 0.0)),
        "by a test not of whole rows",
    ),
    (
        "filled where no query sees",
        guarded(lambda s, p: p.masked_fill((~causal()).all(-2, keepdim=True), 0.0)),
        "by a test not of whole rows",
    ),
    ("small ones dropped", guarded(lambda s, p: p.masked_fill(p < 0.05, 0.0)), "also used by lt"),
    ("vmap, sdpa", mapped_sdpa, "attention inside torch.vmap or torch.func"),
    ("vmap, by hand", mapped_by_hand, "attention inside torch.vmap or torch.func"),
    ("an operator of its own", unknown_operator, "the operator moonfx_test::own_attention is not"),
    ("flash and its sums", flash_for_cpu(lse=True), "more than the output of the operator"),
    ("flash, negative scale", flash_for_cpu(scale=-1.0), "the scores are scaled by -1.0"),
    ("exp as a feature map", exp_feature_map, None),
    ("perplexity", log_likelihood, None),
    ("linear attention", linear_attention, None),
    ("router", router, None),
    ("loss", loss, None),
]


def model_of(body: Body) -> Model:
    generator = torch.Generator().manual_seed(1)
    holed = causal()
    holed[9, 2] = False
    return Model(
        body,
        bias=torch.randn(1, H, N, N, generator=generator),
        table=torch.randn(17, H, generator=generator),
        sink=torch.randn(H, 1, 1, generator=generator),
        mix=torch.randn(H, H, generator=generator),
        gate=torch.randn(8, H * D, generator=generator),
        by_head=torch.rand(1, H, 1, N, generator=generator) < 0.9,
        row=torch.full((1, N), torch.nan),
        holed=holed,
        row_id=torch.arange(N) % 5,
    )


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    given = inputs()
    torch.manual_seed(3)
    expected = model_of(body)(*given)
    torch.manual_seed(3)
    got, report = run(model_of(body), *given)
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)
    assert {r.action for r in report.rows} == (set() if reason is None else {"declined"})
    assert len(report.rows) <= 1 + (body is read_then_changed)
    assert reason is None or reason in outcome(report)[0], outcome(report)[0]
    assert all("(node " in r.reason for r in report.rows)


def test_dropout_is_declined_in_training_and_the_attention_found_again_in_eval() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)

    model = Model(body)
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager", on_miss="ignore")
    model(*inputs())
    model.eval()
    out = model(*inputs())
    assert [r.action for r in moonfx.report(model).rows] == ["declined", "sparse"]
    expected = F.scaled_dot_product_attention(*inputs(), is_causal=True)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


GIVEN = {
    "4-D": causal().expand(B, 1, N, N),
    "4-D float": torch.where(causal(), 0.0, NEG).expand(B, 1, N, N),
    "2-D": causal(),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_mask_that_the_caller_gives_is_never_believed_unseen(kind: str) -> None:
    """Its values are compared at each call; with others, the attention runs as it was written."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    model, first = Model(body), GIVEN[kind]
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager", on_miss="ignore")
    model(*inputs(), first)
    other = first.clone()
    other[..., 9, 2] = other[..., 0, -1]  # one more key is hidden from one query
    out = model(*inputs(), other)
    torch.testing.assert_close(out, body(model, *inputs(), other), atol=2e-6, rtol=1e-5)


def test_causal_from_the_top_left_is_declined_unless_the_lengths_are_equal() -> None:
    q, k, v = inputs()
    _, report = run(
        Model(lambda self, *x: F.scaled_dot_product_attention(*x, is_causal=True)),
        q[:, :, :5],
        k,
        v,
    )
    assert outcome(report)[0].startswith("is_causal aligns the first query with the first key")


def test_cross_attention_is_declined() -> None:
    q, k, v = inputs()
    _, report = run(Model(lambda self, *x: F.scaled_dot_product_attention(*x)), q[:, :, :5], k, v)
    (reason,) = outcome(report)
    assert reason.startswith("bidirectional: no mask and not causal; causal_only=False makes self")
    _, report = run(Model(lambda self, *x: F.scaled_dot_product_attention(*x)), q[:, :, :1], k, v)
    assert "cross-attention or pooling" in outcome(report)[0]


def test_a_padding_mask_that_is_written_to_is_declined() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        mask = causal() & real[:, None, None, :]
        real.fill_(False)  # after the mask was made, before attention reads it
        return F.scaled_dot_product_attention(q, k, v, mask)

    real = torch.ones(B, N, dtype=torch.bool)
    real[1, :7] = False
    expected = F.scaled_dot_product_attention(*inputs(), causal() & real[:, None, None, :])
    out, report = run(Model(body), *inputs(), real.clone())
    assert outcome(report)[0].startswith("the mask is written to in place")
    assert torch.equal(out, expected)


def test_a_triangle_in_a_buffer_that_changes_after_compilation_is_an_error() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~self.triangle, NEG).softmax(-1) @ v

    model = Model(body, triangle=causal())
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    model.triangle.copy_(causal())
    model(*inputs())  # the same values again
    model.triangle[3, 1] = False
    with pytest.raises(RuntimeError, match="proved to hold a causal mask has changed"):
        model(*inputs())
    moonfx.restore(model)
    expected = body(model, *inputs())
    assert torch.equal(model(*inputs()), expected)


def test_a_triangle_that_is_replaced_by_another_tensor_is_an_error() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~self.triangle, NEG).softmax(-1) @ v

    model = Model(body, triangle=causal())
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    model.triangle = torch.ones_like(causal())
    with pytest.raises(RuntimeError, match="proved to hold a causal mask has changed"):
        model(*inputs())


def test_a_buffer_that_no_rewrite_rests_on_may_change() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(y, k, v, self.bias)

    model = Model(body, bias=torch.zeros(N, N))
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    model(*inputs())
    assert [r.action for r in moonfx.report(model).rows] == ["sparse", "declined"]
    model.bias[2, 3] = 1.0
    torch.testing.assert_close(model(*inputs()), body(model, *inputs()), atol=2e-6, rtol=1e-5)


def test_a_reason_names_a_buffer_as_the_model_does() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner(q, k, v)

    inner = Model(masked_by(lambda m, i, j: m.holed), holed=causal())
    inner.holed[3, 1] = False
    model = Model(body)
    model.inner = inner
    _, report = run(model, *inputs())
    assert outcome(report)[0].startswith("the values of the mask 'inner.holed' are not known")


def test_attention_beside_one_under_vmap_is_rewritten_and_both_are_right() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mapped_sdpa(self, y, y, y)

    model = Model(body)
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager")
    for scale in (1.0, 2.0):  # values of the first call must not live on in the graph
        given = [x * scale for x in inputs()]
        torch.testing.assert_close(model(*given), body(model, *given), atol=2e-6, rtol=1e-5)
    assert [r.action for r in moonfx.report(model).rows] == ["sparse", "declined"]


def test_a_router_beside_attention_is_passed_over() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        weight, chosen = F.linear(y, self.gate).softmax(-1).topk(2)
        expert = self.experts[chosen]  # [B, N, 2, H * D, H * D]
        return (weight[..., None, None] * expert).sum(2).matmul(y[..., None])[..., 0]

    generator = torch.Generator().manual_seed(1)
    model = Model(
        body,
        gate=torch.randn(8, H * D, generator=generator),
        experts=torch.randn(8, H * D, H * D, generator=generator),
    )
    _, report = run(model, *inputs())
    assert outcome(report) == ["causal"]
