"""The zoo: each family, in each form, is found, equals dense where it must, and MoBA elsewhere."""

import pytest
import torch
from torch import Tensor, nn

import moonfx
from moonfx.report.report import Report
from tests.support.zoo import HEADS, VOCABULARY, build, logits, oracle

pytest.importorskip("transformers")

N, BLOCK, TOPK, SINKS = 72, 8, 3, 1

# name, form, what the report calls it, key/value heads
ZOO = [
    ("llama", "sdpa", "sdpa", 2),
    ("llama", "eager", "matmul + softmax", 2),
    ("qwen3", "sdpa", "sdpa", 2),
    ("qwen3", "eager", "matmul + softmax", 2),
    ("gpt2", "sdpa", "sdpa", 4),
    ("gpt2", "eager", "matmul + softmax", 4),
    ("gpt_neox", "sdpa", "sdpa", 4),
    ("gpt_neox", "eager", "matmul + softmax", 4),
    ("falcon_mqa", "sdpa", "sdpa", 1),
    ("falcon_mqa", "eager", "matmul + softmax", 1),
    ("falcon_gqa", "sdpa", "sdpa", 4),
    ("falcon_gqa", "eager", "matmul + softmax", 4),
    ("nano", "sdpa", "sdpa", 4),
    ("nano", "eager", "matmul + softmax", 4),
    ("mha", "sdpa", "sdpa", 4),
    ("mha", "eager", "baddbmm + softmax", 4),
]
PADDABLE = [row for row in ZOO if row[0] != "nano"]
FIELDS = ("name", "form", "found", "kv_heads")


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONFX_VERIFY", "1")


def ids(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (batch, N), generator=generator)


def sparse(model: nn.Module, block: int = BLOCK, topk: int = TOPK) -> nn.Module:
    return moonfx.sparsify(model, block, topk, sinks=SINKS, compiler="eager", on_miss="ignore")


def facts(report: Report) -> list[tuple[str, str, str]]:
    assert report.failures == []
    return [(r.form, r.mask, r.action) for r in report.rows]


@pytest.mark.parametrize(FIELDS, ZOO, ids=[f"{r[0]}-{r[1]}" for r in ZOO])
def test_topk_of_all_blocks_is_dense_forward_and_backward(
    name: str, form: str, found: str, kv_heads: int
) -> None:
    model, tokens = build(name, form), ids()
    results = []
    for make in (lambda m: m, lambda m: sparse(m, 16, 5)):
        model.zero_grad()
        out = logits(make(model), tokens)
        out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    report = moonfx.report(model)
    assert facts(report) == [(found, "causal", "sparse")] * 2
    assert {r.kv_heads for r in report.rows} == {kv_heads}
    (dense, dense_grads), (full, grads) = results
    # float32 rounding of sums in another order, through two layers
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-4)
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, dense_grads[parameter], atol=5e-6, rtol=1e-3)


@pytest.mark.parametrize(FIELDS, ZOO, ids=[f"{r[0]}-{r[1]}" for r in ZOO])
def test_fewer_blocks_give_the_reference_in_every_attention(
    name: str, form: str, found: str, kv_heads: int
) -> None:
    model, tokens = build(name, form), ids()
    dense = logits(model, tokens)
    expected, calls = oracle(name, tokens, None, BLOCK, TOPK, SINKS)
    assert calls == 2
    got = logits(sparse(model), tokens)
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-4)
    assert not torch.allclose(got, dense, atol=1e-3)


@pytest.mark.parametrize(FIELDS, PADDABLE, ids=[f"{r[0]}-{r[1]}" for r in PADDABLE])
def test_padding_never_changes_a_real_token(
    name: str, form: str, found: str, kv_heads: int
) -> None:
    model, tokens, short = build(name, form), ids(3), N - 19
    padding = torch.ones_like(tokens)
    sides = {1: slice(N - short, N), 2: slice(0, short)}  # left, right
    alone = {row: tokens[row, :short].clone() for row in sides}
    for row, at in sides.items():
        tokens[row], padding[row] = 0, 0
        tokens[row, at], padding[row, at] = alone[row], 1

    expected, calls = oracle(name, tokens, padding.bool(), BLOCK, TOPK, SINKS)
    assert calls == 2
    got = logits(sparse(model), tokens, padding)
    assert facts(moonfx.report(model)) == [(found, "causal & padding", "sparse")] * 2
    torch.testing.assert_close(got[padding == 1], expected[padding == 1], atol=5e-6, rtol=1e-4)
    for row, at in sides.items():
        if name in ("gpt2", "mha") and row == 1:
            continue  # learned positions count the padding, dense or sparse
        unpadded, _ = oracle(name, alone[row][None], None, BLOCK, TOPK, SINKS)
        torch.testing.assert_close(got[row, at], unpadded[0], atol=2e-5, rtol=1e-3)


def test_multihead_attention_that_returns_its_weights_is_declined() -> None:
    model, tokens = build("mha", "returned"), ids()
    dense = logits(model, tokens)
    assert torch.equal(logits(sparse(model), tokens), dense)
    report = moonfx.report(model)
    assert facts(report) == [("baddbmm + softmax", "", "declined")] * 2
    assert all("the probabilities are also used by" in r.reason for r in report.rows)


def test_returned_attentions_are_declined_and_right() -> None:
    model, tokens = build("llama", "eager"), ids()
    dense = model(tokens, output_attentions=True, use_cache=False)
    got = sparse(model)(tokens, output_attentions=True, use_cache=False)
    assert [r.action for r in moonfx.report(model).rows] == ["declined"] * 2
    assert torch.equal(got.attentions[1], dense.attentions[1])


def test_layers_are_named_as_the_model_names_them() -> None:
    model = build("llama", "sdpa")
    logits(sparse(model), ids())
    rows = moonfx.report(model).rows
    assert [r.layer for r in rows] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert {(r.heads, r.kv_heads, r.head_dim) for r in rows} == {(HEADS, 2, 16)}


@pytest.mark.parametrize(("name", "form"), [("llama", "eager"), ("nano", "eager")])
def test_a_model_with_dynamic_lengths_is_proved_for_all_of_them(name: str, form: str) -> None:
    model = build(name, form)
    sparse(model)
    for length in (40, 56, 72, 33, 64):
        tokens = ids()[:, :length].contiguous()
        expected, _ = oracle(name, tokens, None, BLOCK, TOPK, SINKS)
        torch.testing.assert_close(logits(model, tokens), expected, atol=5e-6, rtol=1e-4)
    report = moonfx.report(model)
    assert report.graphs == 2
    assert {r.action for r in report.rows} == {"sparse"}
