"""Attention operators of other packages: read by their schema, or declined by what they ask for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import SCALE, Model, N, inputs, outcome, run


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What flash-attn registers, over [B, N, H, D], computed densely."""
    s = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * softmax_scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1) > 0, -torch.inf)
    out = (s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).contiguous()
    return out, s.logsumexp(-1), s.new_empty(0), s.new_empty(0)


@flash.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), sums, q.new_empty(0), q.new_empty(0)


def flash_with(**given: Any) -> Model:
    default = {
        "dropout_p": 0.0,
        "softmax_scale": SCALE,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
    }

    def body(self: Model, *x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in x)
        return flash(q, k, v, *{**default, **given}.values())[0].transpose(1, 2)

    return Model(body)


@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_flash_attention_is_read_with_its_layout_and_softcap(cap: float) -> None:
    q, k, v = inputs()
    model = flash_with(softcap=cap)
    dense = model(q, k, v)
    out, report = run(model, q, k, v)
    modifiers = "softcap 0.7" if cap else ""
    rows = [(r.form, r.mask, r.modifiers, r.action) for r in report.rows]
    assert rows == [("flash_attn_forward", "causal", modifiers, "sparse")]
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
    sparse, _ = run(model, q, k, v, block=4, topk=2)
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, softcap=cap))
    torch.testing.assert_close(sparse, expected, atol=2e-6, rtol=1e-5)


DECLINED = [
    ({"window_size_left": 5}, "with window_size_left=5"),
    ({"alibi_slopes": torch.ones(4)}, "with alibi_slopes="),
    ({"dropout_p": 0.1}, "dropout p=0.1 is active"),
    ({"causal": False}, "bidirectional"),
    ({"softmax_scale": -1.0}, "the scores are scaled by -1.0"),
]


@pytest.mark.parametrize(("given", "reason"), DECLINED, ids=[d[1] for d in DECLINED])
def test_what_flash_attention_is_asked_for_beside_is_declined(
    given: dict[str, Any], reason: str
) -> None:
    model = flash_with(**given)
    dense = model(*inputs())
    out, report = run(model, *inputs())
    assert reason in outcome(report)[0], outcome(report)
    assert torch.equal(out, dense)


def test_sdpa_takes_its_arguments_by_keyword() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(
            value=v, key=k, query=q, attn_mask=mask, dropout_p=0.0, scale=None
        )

    q, k, v = inputs()
    out, report = run(Model(body), q, k, v, block=4, topk=2)
    assert outcome(report) == ["causal"]
    torch.testing.assert_close(
        out, moba_attention(q, k, v, MobaArguments(4, 2))[0], atol=2e-6, rtol=1e-5
    )
