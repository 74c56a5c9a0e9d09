"""Scores that look like causal attention's and are not: declined by name, left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import NEG, SCALE, H, Model, N, causal
from tests.passes.attention.lookalikes import (
    Body,
    Row,
    attend,
    check_lookalike,
    masked,
    scores,
)


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


BIAS = "additive bias"

LOOKALIKES: list[Row] = [
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
    ("mask subtracted", minus_twice_the_mask, "additive bias"),
    ("subtracted from", subtracted_from, "the scores are subtracted from something"),
    ("clamped below", clamped(min=-50.0), "the scores are clamped at -50.0"),
    ("clamped above", clamped(max=2.0), "the scores are clamped at 2.0"),
    ("no less than 0", no_less_than_zero, "the scores are clamped at zeros"),
    ("cdist", by_distance(torch.cdist), "the scores are a distance (cdist)"),
    (
        "cdist squared",
        by_distance(lambda q, k: torch.cdist(q, k) ** 2),
        "the scores are a distance",
    ),
    ("negative scale", negative_scale, "the scores are scaled by -1.0"),
    ("negative scale, sdpa", negative_scale_sdpa, "the scores are scaled by -0.3"),
    ("scale by head", scale_by_head, "the scores are scaled by a tensor"),
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)
