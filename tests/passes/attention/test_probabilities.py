"""What becomes of probabilities before they meet the values: nothing, or it is declined."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    NEG,
    Model,
    N,
    causal,
    check_form,
    hidden,
    inputs,
)
from tests.passes.attention.lookalikes import Body, Row, check_lookalike, masked, scores


def divided_last(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = hidden(scores(q, k))
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def dropout_of_zero(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(hidden(scores(q, k)).softmax(-1), 0.0, training=True) @ v


FORMS: list[tuple[str, Body]] = [
    ("divided last", divided_last),
    ("dropout of 0", dropout_of_zero),
]


@pytest.mark.parametrize("body", [f[1] for f in FORMS], ids=[f[0].replace(" ", "-") for f in FORMS])
def test_what_changes_no_probability_is_followed(body: Body) -> None:
    expected = lambda q, k, v: moba_attention(q, k, v, MobaArguments(4, 2))[0]  # noqa: E731
    check_form(body, expected, form="matmul + softmax")


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


def exp_divided_last_by_another_sum(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = masked(q, k)
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return (e @ v) / (e.sum(-1, keepdim=True) + 1.0)


LOOKALIKES: list[Row] = [
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
    ("a key cut off", changed(lambda p: F.pad(p[..., 1:], (0, 1))), "stands between"),
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
    ("exp, divided by more", exp_divided_last_by_another_sum, "not divided by that sum"),
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
