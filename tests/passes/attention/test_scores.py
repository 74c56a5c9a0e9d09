"""Scales and softcaps, however they are written: found, kept, and equal to dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import (
    SCALE,
    Model,
    causal,
    check_form,
    hidden,
)

CAP = 0.7  # low enough that the scores of these inputs reach it


def cap_divided(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return hidden(torch.tanh(s / CAP) * CAP).softmax(-1) @ v


def cap_step_by_step(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma-2's own form."""
    s = q @ k.mT * SCALE
    s = s / CAP
    s = torch.tanh(s)
    s = s * CAP
    return hidden(s).softmax(-1) @ v


def cap_commuted(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(CAP * (q @ k.mT * (SCALE / CAP)).tanh()).softmax(-1) @ v


def cap_in_place(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    s = s.div_(CAP).tanh_() * CAP
    return s.masked_fill_(~causal(), -torch.inf).softmax(-1) @ v


def cap_scales_query(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q * (SCALE / CAP), k).tanh() / (1 / CAP)
    return (s + torch.where(causal(), 0.0, -torch.inf)).softmax(-1) @ v


def cap_of_a_buffer(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden((q @ k.mT * SCALE / self.cap).tanh() * self.cap).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moba_attention(q, k, v, MobaArguments(4, 2, softcap=CAP))[0]


CAPS = [
    (cap_divided, "matmul + softmax"),
    (cap_step_by_step, "matmul + softmax"),
    (cap_commuted, "matmul + softmax"),
    (cap_in_place, "matmul + softmax"),
    (cap_of_a_buffer, "matmul + softmax"),
]


@pytest.mark.parametrize(("body", "form"), CAPS, ids=[c[0].__name__ for c in CAPS])
def test_a_softcap_is_read_from_its_constants(body: Callable[..., Any], form: str) -> None:
    check_form(body, capped, form=form, modifiers="softcap 0.7", cap=torch.tensor(CAP))


def test_a_softcap_over_a_scaled_query_keeps_that_query() -> None:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q * (SCALE / CAP), k, v, MobaArguments(4, 2, scale=CAP, softcap=CAP))[
            0
        ]

    check_form(cap_scales_query, expected, form="einsum + softmax", modifiers="softcap 0.7")


def test_a_softcap_that_is_not_the_divisor_scales_the_scores_as_well() -> None:
    """a * tanh(b * s) is a softcap of a over scores scaled by a * b."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hidden(2.0 * (q @ k.mT * 0.3).tanh()).softmax(-1) @ v

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, MobaArguments(4, 2, scale=0.6, softcap=2.0))[0]

    check_form(body, expected, form="matmul + softmax", modifiers="softcap 2")


def scores(q: Tensor, k: Tensor) -> Tensor:
    return hidden(q @ k.mT * SCALE)
