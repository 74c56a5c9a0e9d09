"""What looks like a softmax over the keys and its product, and is not: declined, left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from tests.passes.attention.forms import NEG, Model, N, causal, inputs
from tests.passes.attention.lookalikes import (
    Body,
    Row,
    check_lookalike,
    masked,
    scores,
)


def softmax_over(dim: int) -> Body:
    """pytorch#196468: Inductor 2.13 rewrites both."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~causal(), NEG).softmax(dim) @ v

    return body


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


def mixed_after(mix: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """Probabilities that are changed between the softmax and the values."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mix(masked(q, k).softmax(-1), self.mix) @ v

    return body


def dropout(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return F.dropout(p, 0.5, training=True) @ v


def dropout_sdpa(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)


def detached_in_float32(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k).softmax(-1).double().detach().float() @ v


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


LOOKALIKES: list[Row] = [
    ("softmax over the queries", softmax_over(-2), "softmax over dim -2 of 4"),
    ("softmax over the heads", softmax_over(1), "softmax over dim 1 of 4"),
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
    ("a key cut off", guarded(lambda s, p: F.pad(p[..., 1:], (0, 1))), "stands between"),
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
    ("dropout", dropout, "dropout p=0.5 is active"),
    ("dropout, sdpa", dropout_sdpa, "dropout p=0.5 is active"),
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
]


@pytest.mark.parametrize(
    ("body", "reason"), [r[1:] for r in LOOKALIKES], ids=[r[0] for r in LOOKALIKES]
)
def test_a_lookalike_is_declined_by_name_and_runs_as_it_was(body: Body, reason: str | None) -> None:
    check_lookalike(body, reason)


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
