"""What a mask is proved to be, for every shape: by hand, from Hugging Face, and at random."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import moonfx
from moonfx.passes.attention import find_attention, lay_out_heads
from moonfx.passes.context import Context
from moonfx.passes.masks import classify_mask
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite
from tests.passes.attention.forms import NEG

transformers = pytest.importorskip("transformers")

B, H, D = 2, 4, 8


def trace(
    mask: Callable[..., Tensor], queries: int, keys: int, *, dynamic: bool, padding: bool = False
) -> fx.GraphModule:
    """sdpa(q, k, v, mask(query length, key length[, real])) in pre-dispatch ATen."""

    def attend(x: Tensor, y: Tensor, *real: Tensor) -> Tensor:
        # Vectors, so that lengths alone are symbols, never heads or head_dim.
        q, k = (z[:, None].expand(-1, B * H * D).reshape(-1, B, H, D) for z in (x, y))
        q, k = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3)
        given = [torch.stack(real)] if real else []
        return F.scaled_dot_product_attention(q, k, k, mask(q.shape[2], k.shape[2], *given))

    real = [torch.ones(keys, dtype=torch.long) for _ in range(B if padding else 0)]
    mode = "symbolic" if dynamic else "real"
    traced = make_fx(attend, pre_dispatch=True, tracing_mode=mode)
    return traced(torch.zeros(queries), torch.zeros(keys), *real)


def classified(gm: fx.GraphModule) -> AttentionSite:
    context = Context(gm, lambda *given: LayerPolicy())
    find_attention.run(gm.graph, context)
    lay_out_heads.run(gm.graph, context)
    classify_mask.run(gm.graph, context)
    (site,) = context.sites
    return site


def verdict(gm: fx.GraphModule) -> str:
    site = classified(gm)
    if site.mask is not None:
        return site.mask.kind
    assert site.reject is not None
    return site.reject.reason


def rows(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def columns(n: int) -> Tensor:
    return torch.arange(n)[None, :]


def real_keys(real: Tensor) -> Tensor:
    return real[:, None, None, :] != 0


def float_mask(keep: Tensor) -> Tensor:
    return (1.0 - keep.float()) * NEG


CAUSAL, PADDED = "causal", "causal & padding"

# name, mask(n, k[, real]), expected
MASKS: list[tuple[str, Callable[..., Tensor], str]] = [
    ("less or equal", lambda n, k: columns(k) <= rows(n) + (k - n), CAUSAL),
    ("less than", lambda n, k: columns(k) < rows(n) + (k - n) + 1, CAUSAL),
    ("greater or equal", lambda n, k: rows(n) + (k - n) >= columns(k), CAUSAL),
    ("not greater", lambda n, k: ~(columns(k) > rows(n) + (k - n)), CAUSAL),
    ("difference", lambda n, k: rows(n) + (k - n) - columns(k) >= 0, CAUSAL),
    ("arange from an offset", lambda n, k: columns(k) <= torch.arange(k - n, k)[:, None], CAUSAL),
    ("tril", lambda n, k: torch.ones(k, k).tril()[k - n :] > 0, CAUSAL),
    ("tril of a bool", lambda n, k: torch.ones(n, k, dtype=torch.bool).tril(k - n), CAUSAL),
    ("triu of -inf", lambda n, k: torch.full((n, k), -torch.inf).triu(k - n + 1), CAUSAL),
    ("1 - tril", lambda n, k: (1.0 - torch.ones(n, k).tril(k - n)) * -1e9, CAUSAL),
    ("where", lambda n, k: torch.where(columns(k) <= rows(n) + (k - n), 0.0, NEG), CAUSAL),
    ("float of a bool", lambda n, k: float_mask(columns(k) <= rows(n) + (k - n)), CAUSAL),
    ("mul of bools", lambda n, k: (columns(k) <= rows(n) + (k - n)) * (columns(k) >= 0), CAUSAL),
    ("float positions", lambda n, k: columns(k).float() <= rows(n).float() + (k - n), CAUSAL),
    ("always true and", lambda n, k: (columns(k) <= rows(n) + (k - n)) & (columns(k) < k), CAUSAL),
    ("or never true", lambda n, k: (columns(k) <= rows(n) + (k - n)) | (columns(k) >= k), CAUSAL),
    ("padding", lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & real_keys(m), PADDED),
    (
        "padding gathered",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) & m.bool()[:, torch.arange(k)][:, None, None]
        ),
        PADDED,
    ),
    (
        "padding added",
        lambda n, k, m: float_mask(columns(k) <= rows(n) + (k - n)) + float_mask(real_keys(m)),
        PADDED,
    ),
    (
        "padding by where",
        lambda n, k, m: torch.where(real_keys(m), float_mask(columns(k) <= rows(n) + (k - n)), NEG),
        PADDED,
    ),
    ("top-left", lambda n, k: columns(k) <= rows(n), "causal with offset 0"),
    ("strict", lambda n, k: columns(k) < rows(n) + (k - n), "causal with offset"),
    ("one ahead", lambda n, k: columns(k) <= rows(n) + (k - n) + 1, "causal with offset"),
    ("half positions", lambda n, k: columns(k).half() <= rows(n).half() + (k - n), "the values of"),
    (
        "steps of two",
        lambda n, k: torch.arange(0, 2 * k, 2)[None] <= rows(n) + (k - n),
        "unsupported",
    ),
    ("sum", lambda n, k: columns(k) + rows(n) <= k, "unsupported"),
    (
        "window",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) & (columns(k) > rows(n) + (k - n) - 4),
        "sliding window of 4",
    ),
    ("only padding", lambda n, k, m: real_keys(m).expand(B, 1, n, k), "the mask is not causal"),
    (
        "padding of queries",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & (m[:, None, -n:, None] != 0),
        "whole queries",
    ),
    (
        "padding or causal",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) | real_keys(m),
        "prefix-LM: the keys of a prefix (by 'stack')",
    ),
    (
        "padding shifted back",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & real_keys(m.roll(1, 1)),
        PADDED,
    ),
    (
        "padding by rank",
        lambda n, k, m: (columns(k) <= rows(n) + (k - n)) & (m.cumsum(1)[:, None, None] > 0),
        PADDED,
    ),
    (
        "padding read by row",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) & (m.T[:B, None, :1].expand(B, 1, 1) != 0)[:, None]
        ),
        "the mask compares",
    ),
    (
        "float padding",
        lambda n, k, m: (
            float_mask(columns(k) <= rows(n) + (k - n)) + (1.0 - m[:, None, None].float()) * NEG
        ),
        PADDED,
    ),
    (
        "or everything",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) | (rows(n) >= 0),
        "the mask is not causal",
    ),
    ("triu of True", lambda n, k: ~torch.ones(n, k, dtype=torch.bool).triu(k - n + 1), CAUSAL),
    ("clamped", lambda n, k: (columns(k) - rows(n) - (k - n)).clamp(min=0) == 0, "unsupported"),
    ("log of 0 and 1", lambda n, k: torch.ones(n, k).tril(k - n).log(), CAUSAL),
    (
        "min and min",
        lambda n, k, m: (
            torch.where(columns(k) <= rows(n) + (k - n), 0.0, NEG)
            + torch.where(real_keys(m), 0.0, NEG)
        ),
        PADDED,
    ),
    (
        "1 - product",
        lambda n, k, m: (
            (1.0 - (columns(k) <= rows(n) + (k - n)).float() * real_keys(m).float()) * NEG
        ),
        PADDED,
    ),
    (
        "counted positions",
        lambda n, k: torch.ones(k).cumsum(0)[None] <= torch.ones(n).cumsum(0)[:, None] + (k - n),
        CAUSAL,
    ),
    (
        "chunk",
        lambda n, k: (
            (columns(k) <= rows(n) + (k - n)) & (columns(k) // 4 == (rows(n) + (k - n)) // 4)
        ),
        "chunked attention of 4 tokens",
    ),
    (
        "window to both sides",
        lambda n, k: (rows(n) + (k - n) - columns(k)).abs() <= 3,
        "sliding window of 7 tokens, 3 to either side",
    ),
    (
        "prefix",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) | (columns(k) < m.sum(1)[:, None, None, None])
        ),
        "prefix-LM: the keys of a prefix (by 'sum_1')",
    ),
    (
        "groups seen both ways",
        lambda n, k, m: (
            (columns(k) <= rows(n) + (k - n)) | (m[:, None, -n:, None] == m[:, None, None])
        ),
        "a choice between masks: causal, or",
    ),
    (
        "nothing",
        lambda n, k: (columns(k) <= rows(n) + (k - n)) & (rows(n) < 0),
        "the mask hides every key",
    ),
]


def takes_padding(mask: Callable[..., Tensor]) -> bool:
    return mask.__code__.co_argcount == 3


TRIL = next(mask for name, mask, _ in MASKS if name == "tril")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (5, 12)], ids=["square", "chunk"])
@pytest.mark.parametrize(("mask", "expected"), [m[1:] for m in MASKS], ids=[m[0] for m in MASKS])
def test_a_mask_is_named_for_every_shape(
    mask: Callable[..., Tensor], expected: str, queries: int, keys: int, dynamic: bool
) -> None:
    got = verdict(trace(mask, queries, keys, dynamic=dynamic, padding=takes_padding(mask)))
    if expected == "causal with offset 0" and queries == keys:
        expected = CAUSAL
    if mask is TRIL and dynamic and queries < keys:
        expected = "the values of"  # k - n is not known to be a position from the front
    if expected in (CAUSAL, PADDED):
        assert got == expected
    else:
        assert got.startswith(expected) or expected in got


# --- random masks ---------------------------------------------------------------------------------

Part = Callable[[Tensor, Tensor, int, int, Tensor], Tensor]

# Parts of a mask over rows i [n, 1], columns j [1, k], lengths n and k, and real [B, 1, 1, k].
CAUSAL_PARTS: list[Part] = [
    lambda i, j, n, k, m: j <= i + (k - n),
    lambda i, j, n, k, m: ~(j > i + (k - n)),
    lambda i, j, n, k, m: (i - j) + k >= n,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool).tril(k - n),
    lambda i, j, n, k, m: torch.where(j > i + (k - n), -1e9, 0.0) == 0,
]
HARMLESS_PARTS: list[Part] = [
    lambda i, j, n, k, m: j >= 0,
    lambda i, j, n, k, m: i < n,
    lambda i, j, n, k, m: j < k + i,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool),
]
PADDING_PARTS: list[Part] = [
    lambda i, j, n, k, m: m,
    lambda i, j, n, k, m: ~(~m),
    lambda i, j, n, k, m: m.long() > 0,
    lambda i, j, n, k, m: m[..., torch.arange(k)],
]
WRONG_PARTS: list[Part] = [
    lambda i, j, n, k, m: j < i + (k - n),
    lambda i, j, n, k, m: j <= i + (k - n) - 1,
    lambda i, j, n, k, m: j + i >= 2,
    lambda i, j, n, k, m: j * 2 <= i + k,
    lambda i, j, n, k, m: j >= i + (k - n) - 2,
    lambda i, j, n, k, m: i + j != 3,
    lambda i, j, n, k, m: j < 4,
    lambda i, j, n, k, m: i > 0,
    lambda i, j, n, k, m: torch.ones(n, k, dtype=torch.bool).triu(),
    lambda i, j, n, k, m: m.transpose(-1, -2)[..., -n:, :],
]
JOINS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a & b,
    lambda a, b: torch.logical_and(a, b),
    lambda a, b: ~(~a | ~b),
    lambda a, b: torch.where(a, b, False),
    lambda a, b: (a * b) != 0,
    lambda a, b: b.masked_fill(~a, False),
    lambda a, b: (float_mask(a) + float_mask(b)) == 0,
]
FINISHES: list[Callable[[Tensor], Tensor]] = [lambda keep: keep, float_mask]


@st.composite
def right_masks(draw: Any) -> tuple[list[Part], list[Any], Any]:
    parts = [
        draw(st.sampled_from(CAUSAL_PARTS)),
        *draw(st.lists(st.sampled_from(HARMLESS_PARTS + PADDING_PARTS + CAUSAL_PARTS), max_size=3)),
    ]
    parts = draw(st.permutations(parts))
    joins = [draw(st.sampled_from(JOINS)) for _ in parts[1:]]
    return parts, joins, draw(st.sampled_from(FINISHES))


def compose(parts: list[Part], joins: list[Any], finish: Any) -> Callable[..., Tensor]:
    def mask(n: int, k: int, real: Tensor) -> Tensor:
        given = rows(n), columns(k), n, k, real_keys(real)
        keep = parts[0](*given).expand(B, 1, n, k)
        for part, join in zip(parts[1:], joins, strict=True):
            keep = join(keep, part(*given).expand(B, 1, n, k))
        return finish(keep)

    return mask


SIZES = st.sampled_from([(9, 9), (4, 9)])


@settings(max_examples=25)
@given(made=right_masks(), size=SIZES, dynamic=st.booleans())
def test_masks_made_of_supported_parts_are_classified_as_what_they_compute(
    made: Any, size: tuple[int, int], dynamic: bool
) -> None:
    expected = PADDED if any(part in PADDING_PARTS for part in made[0]) else CAUSAL
    assert verdict(trace(compose(*made), *size, dynamic=dynamic, padding=True)) == expected


@settings(max_examples=25)
@given(made=right_masks(), wrong=st.sampled_from(WRONG_PARTS), at=st.integers(0, 3), size=SIZES)
def test_masks_with_one_wrong_part_are_never_supported(
    made: Any, wrong: Part, at: int, size: tuple[int, int]
) -> None:
    parts, joins, finish = made
    parts = [*parts[:at], wrong, *parts[at:]]
    joins = [*joins, JOINS[0]]
    got = verdict(trace(compose(parts, joins, finish), *size, dynamic=False, padding=True))
    assert got not in (CAUSAL, PADDED)


# --- Hugging Face ---------------------------------------------------------------------------------


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
