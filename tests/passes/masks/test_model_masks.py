"""Masks that Hugging Face models make: of chunks, caches and sliding windows."""

from typing import Any

import pytest
import torch

import moonfx
from tests.passes.masks.traced_masks import CAUSAL

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    from tests.support.zoo import build

    return moonfx.sparsify(build("llama", "sdpa"), 8, 3, compiler="eager", on_miss="ignore")


def test_a_prompt_given_in_chunks_is_causal_with_the_offset_of_the_cache() -> None:
    model, ids = llama(), torch.arange(2, 90)[None]
    whole = model(ids, use_cache=False).logits
    cache = transformers.DynamicCache()
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 40), (40, 88))]
    assert {(r.mask, r.action) for r in moonfx.report(model).rows} == {(CAUSAL, "sparse")}
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-6, rtol=1e-4)


def test_a_step_on_a_static_cache_is_declined_by_name() -> None:
    model, ids = llama(), torch.arange(2, 50)[None]
    with moonfx.full_attention(model):
        dense = model(ids, use_cache=False).logits[:, -1]
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with moonfx.full_attention(model):
        model(ids[:, :-1].contiguous(), past_key_values=cache)
    got = model(ids[:, -1:].contiguous(), past_key_values=cache).logits[:, -1]
    rows = moonfx.report(model).rows
    assert [r.action for r in rows] == ["declined"] * 2
    assert all("static cache" in r.reason for r in rows), rows[0].reason
    torch.testing.assert_close(got, dense, atol=5e-6, rtol=1e-4)


def mistral() -> Any:
    config = transformers.MistralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    return transformers.MistralForCausalLM(config).eval()


def test_a_sliding_window_model_is_declined_by_name() -> None:
    model, ids = mistral(), torch.arange(2, 50)[None]
    dense = model(ids, use_cache=False).logits
    moonfx.sparsify(model, 8, 3, compiler="eager", on_miss="ignore")
    assert torch.equal(model(ids, use_cache=False).logits, dense)
    assert {r.reason.split(" (node")[0] for r in moonfx.report(model).rows} == {
        "sliding window of 16 tokens, which is already sparse: 16 tokens <= block*topk = 24; "
        "nothing to change"
    }


def test_a_window_longer_than_what_moba_attends_is_only_named() -> None:
    report = moonfx.explain(mistral(), torch.arange(2, 50)[None], block=4, topk=3, use_cache=False)
    assert {r.reason.split(" (node")[0] for r in report.rows} == {"sliding window of 16 tokens"}


@pytest.mark.parametrize("windowed_cache", [False, True])
def test_a_step_of_a_sliding_window_model_is_declined_by_name(windowed_cache: bool) -> None:
    model, ids = mistral(), torch.arange(2, 50)[None]
    moonfx.sparsify(model, 8, 3, compiler="eager", on_miss="ignore")
    config = {"config": model.config} if windowed_cache else {}
    cache = transformers.DynamicCache(**config)
    with moonfx.full_attention(model):
        model(ids, past_key_values=cache)
    for _ in range(3):
        model(ids[:, -1:].contiguous(), past_key_values=cache)
    declined = [r.reason for r in moonfx.report(model).rows if r.action == "declined"]
    assert declined
    assert all(reason.startswith("sliding window") for reason in declined), declined
