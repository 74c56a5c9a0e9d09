"""What happens between an attention's operands and its output: writes, no_grad, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs, outcome, run

Body = Callable[..., Any]


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.masked_fill(~causal(), NEG).softmax(-1) @ v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def repeated(x: Tensor) -> Tensor:
    return x[:, :2, None].expand(B, 2, 2, N, D).reshape(B, H, N, D)


# --- writes ---------------------------------------------------------------------------------------


def scale_changed_after_the_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-2, -1)) * self.scale
    self.scale.mul_(0.5)
    return attend(s, v)


def scale_changed_before_the_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.scale.mul_(0.5)
    return attend((q @ k.transpose(-2, -1)) * self.scale, v)


def key_changed_after_the_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1.0
    s = scores(q, k)
    k.zero_()
    return attend(s, v) + k


def key_made_by_slice_writes(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = k.new_empty(k.shape)
    made[..., : D // 2] = k[..., : D // 2]
    made[..., D // 2 :] = k[..., D // 2 :]
    return attend(scores(q, made), v)


def repeated_key_changed(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide, v = (torch.repeat_interleave(x[:, :2], 2, dim=1) for x in (k, v))
    wide[0].mul_(2.0)
    return F.scaled_dot_product_attention(q, wide, v, is_causal=True)


def value_changed_before_the_product(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v * 1.0
    first, _ = v.split(N // 2, dim=2)
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    first.add_(1.0)
    return p @ v


WRITES: list[tuple[str, Body, str]] = [
    ("scale after", scale_changed_after_the_scores, "the scale is written to in place after"),
    ("scale before", scale_changed_before_the_scores, "causal"),
    ("key after", key_changed_after_the_scores, "key is written to in place after"),
    ("key before", key_made_by_slice_writes, "causal"),
    ("value before", value_changed_before_the_product, "causal"),
    ("repeated key", repeated_key_changed, "a part of the attention is written to in place"),
]


@pytest.mark.parametrize(("body", "expected"), [r[1:] for r in WRITES], ids=[r[0] for r in WRITES])
def test_an_operand_is_read_as_it_was_where_the_attention_read_it(
    body: Body, expected: str
) -> None:
    make = lambda: Model(body, scale=torch.tensor(0.25))  # noqa: E731
    dense = make()(*inputs())
    out, report = run(make(), *inputs())
    (got,) = outcome(report)
    assert got.startswith(expected), got
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


# --- gradients ------------------------------------------------------------------------------------


def no_grad_probabilities(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    return p @ v


def no_grad_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = scores(q, k)
    return attend(s, v)


def no_grad_product(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~causal(), NEG).softmax(-1)
    with torch.no_grad():
        y = p @ v
    return y + q * k * v


def no_grad_transpose(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        key = k.transpose(-1, -2)
    return attend(q @ key * SCALE, v)


def no_grad_repeat(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        wide = repeated(k)
    return F.scaled_dot_product_attention(q, wide, repeated(v), is_causal=True)


def no_grad_mask(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = k.transpose(-1, -2)
    with torch.no_grad():
        mask = torch.where(causal(), 0.0, NEG)
    return (q @ key * SCALE + mask).softmax(-1) @ v


def no_grad_factor(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        factor = q.abs().mean()
    return attend(scores(q, k) * factor, v)


def no_grad_before(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k * 2.0
    return attend(scores(q, k), v)


def no_grad_whole(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = attend(scores(q, k), v)
    return y + q * k * v


def detached(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~causal(), NEG).softmax(-1).detach() @ v


NO_GRAD = "part of the attention is under torch.no_grad(); put all or none under it"

GRADIENTS: list[tuple[str, Body, str]] = [
    ("probabilities", no_grad_probabilities, NO_GRAD),
    ("scores", no_grad_scores, NO_GRAD),
    ("product", no_grad_product, NO_GRAD),
    ("transpose of the key", no_grad_transpose, NO_GRAD),
    ("repeat_kv of the key", no_grad_repeat, NO_GRAD),
    ("detach", detached, "the probabilities are detached; take the detach() away"),
    ("mask", no_grad_mask, "causal"),
    ("factor", no_grad_factor, "causal"),
    ("before the attention", no_grad_before, "causal"),
    ("the whole of it", no_grad_whole, "causal"),
]


@pytest.mark.parametrize(
    ("body", "expected"), [r[1:] for r in GRADIENTS], ids=[r[0] for r in GRADIENTS]
)
def test_gradients_stop_where_they_stop_in_dense_attention(body: Body, expected: str) -> None:
    def gradients(call: Callable[..., Any]) -> tuple[Any, list[Tensor | None]]:
        leaves = [x.requires_grad_() for x in inputs()]
        out, report = call(*leaves)
        out.square().sum().backward()
        return report, [x.grad for x in leaves]

    _, dense = gradients(lambda *x: (body(None, *x), None))
    report, got = gradients(lambda *x: run(Model(body), *x))
    assert outcome(report) == [expected]
    for one, other in zip(got, dense, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_without_gradients_a_no_grad_inside_changes_nothing() -> None:
    for body in (no_grad_probabilities, no_grad_product):
        with torch.no_grad():
            out, report = run(Model(body), *inputs())
        assert outcome(report) == ["causal"]
        torch.testing.assert_close(out, body(None, *inputs()), atol=2e-6, rtol=1e-5)


# --- autocast -------------------------------------------------------------------------------------


def autocast_scores(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        s = scores(q, k)
    return attend(s.float(), v)


def autocast_off_for_the_softmax(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        s = scores(q, k)
        with torch.autocast("cpu", enabled=False):
            p = s.float().masked_fill(~causal(), NEG).softmax(-1)
        return p @ v


def autocast_whole(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return scores(q, k).masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def autocast_before(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        k = (k @ torch.eye(D)).float()
    return attend(scores(q, k), v)


AUTOCAST = "part of the attention is under another autocast; put all of it under one"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (autocast_scores, AUTOCAST),
        (autocast_off_for_the_softmax, AUTOCAST),
        (autocast_whole, "causal"),
        (autocast_before, "causal"),
    ],
)
def test_attention_runs_under_one_autocast_or_stays_as_it_is(body: Body, expected: str) -> None:
    out, report = run(Model(body), *inputs())
    assert outcome(report) == [expected]
    tolerance = 2e-2 if body is autocast_whole else 2e-6  # bfloat16: 8 bits
    torch.testing.assert_close(out, body(None, *inputs()), atol=tolerance, rtol=tolerance)


# --- a model that builds its keys in place --------------------------------------------------------


@pytest.mark.parametrize("form", ["eager", "sdpa"])
@pytest.mark.parametrize("value_dim", [16, 24])
def test_deepseek_is_sparse_with_values_of_any_head_dim(form: str, value_dim: int) -> None:
    """Its keys are written by slices into an empty tensor before attention reads them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=value_dim,
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM._from_config(config, attn_implementation=form).eval()
    ids = torch.arange(2, 42)[None]

    def gradients(call: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad()
        call().square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def sparse() -> Tensor:
        out, report = run(model, ids, block=64)
        assert outcome(report) == ["causal"]
        return out.logits

    dense, got = gradients(lambda: model(ids, use_cache=False).logits), gradients(sparse)
    assert dense.keys() == got.keys()
    for name in dense:
        torch.testing.assert_close(got[name], dense[name], atol=1e-5, rtol=1e-3, msg=name)
