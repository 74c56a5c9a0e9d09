"""Steps of decoding: one query whose token is that of the last key, and what only looks like it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from tests.passes.attention.forms import outcome

N, BLOCK, TOPK, HEADS, WIDTH = 24, 4, 2, 4, 32
DIM = WIDTH // HEADS
Cache = tuple[Tensor | None, Tensor | None]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)


def grown(past: Tensor | None, new: Tensor, dim: int) -> Tensor:
    return new if past is None else torch.cat([past, new], dim)


def rope(x: Tensor, at: int) -> Tensor:
    """Rotary positions of [B, H, N, D], the first of them `at`."""
    angle = (torch.arange(x.shape[-2]) + at)[:, None] * torch.linspace(0.1, 1, x.shape[-1] // 2)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    """Causal self-attention; `keys(layer, x, cache)` gives key, value and the cache as it grew."""

    def __init__(self, keys: Callable[..., tuple[Tensor, Tensor, Cache]]) -> None:
        super().__init__()
        self.keys = keys
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.one, self.down, self.side = (nn.Linear(WIDTH, DIM) for _ in range(3))
        self.up, self.norm, self.small = nn.Linear(DIM, WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(DIM)

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        y = self.norm(x)
        key, value, cache = self.keys(self, y, cache)
        query = rope(heads(self.q(y)), key.shape[2] - y.shape[1])
        query = torch.cat([query, query], -1)[..., : key.shape[-1]]
        n, m = query.shape[2], key.shape[2]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out = F.scaled_dot_product_attention(query, key, value, seen)
        return x + self.o(out.transpose(1, 2).flatten(2)), cache


class Decoder(nn.Module):
    def __init__(self, keys: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(99, WIDTH), nn.ModuleList(Layer(keys) for _ in "ab")

    def forward(self, ids: Tensor, caches: Any = ((None, None),) * 2) -> tuple[Tensor, Any]:
        x, kept = self.embed(ids), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache)
            kept.append(cache)
        return x, kept


def length(past: Tensor | None, dim: int) -> int:
    return 0 if past is None else past.shape[dim]


def of_heads(layer: Layer, x: Tensor, cache: Cache) -> Any:
    key, value = heads(layer.k(x)), heads(layer.v(x))
    cache = grown(cache[0], rope(key, length(cache[0], 2)), 2), grown(cache[1], value, 2)
    return *cache, cache


def of_features(layer: Layer, x: Tensor, cache: Cache) -> Any:
    cache = grown(cache[0], layer.k(x), 1), grown(cache[1], layer.v(x), 1)
    return rope(heads(cache[0]), 0), heads(cache[1]), cache


def one_tensor(layer: Layer, x: Tensor, cache: Cache) -> Any:
    both = grown(cache[0], torch.cat([layer.k(x), layer.v(x)], -1), 1)
    key, value = both.chunk(2, -1)
    return heads(key) * 0.5, heads(value), (both, None)


def turned(layer: Layer, x: Tensor, cache: Cache) -> Any:
    key = grown(cache[0], heads(layer.k(x)).transpose(2, 3), 3)
    value = grown(cache[1], heads(layer.v(x)), 2)
    return key.transpose(2, 3), value, (key, value)


def tokens_first(layer: Layer, x: Tensor, cache: Cache) -> Any:
    cache = tuple(grown(c, p(x).transpose(0, 1), 0) for c, p in zip(cache, (layer.k, layer.v)))
    key, value = (heads(c.transpose(0, 1)) for c in cache)
    return key, value, cache


def heads_in_batch(layer: Layer, x: Tensor, cache: Cache) -> Any:
    cache = tuple(grown(c, heads(p(x)).flatten(0, 1), 1) for c, p in zip(cache, (layer.k, layer.v)))
    key, value = (c.unflatten(0, (-1, HEADS)) for c in cache)
    return key, value, cache


def repeated(layer: Layer, x: Tensor, cache: Cache) -> Any:
    cache = grown(cache[0], layer.one(x), 1), grown(cache[1], layer.down(x), 1)
    return *(c[:, None].repeat(1, HEADS, 1, 1) for c in cache), cache


def repeated_before(layer: Layer, x: Tensor, cache: Cache) -> Any:
    wide = (p(x)[:, None].repeat_interleave(HEADS, 1) for p in (layer.one, layer.down))
    cache = tuple(grown(c, w, 2) for c, w in zip(cache, wide))
    return *cache, cache


def latent(layer: Layer, x: Tensor, cache: Cache) -> Any:
    low = grown(cache[0], layer.down(x), 1)
    side = grown(cache[1], rope(layer.side(x)[:, None], length(cache[1], 2)), 2)
    value = heads(layer.up(layer.small(low)))
    key = torch.cat([value, side.expand(-1, HEADS, -1, -1)], -1)
    return key, value, (low, side)


def filled(layer: Layer, x: Tensor, cache: Cache) -> Any:
    key, value, cache = latent(layer, x, cache)
    made = key.new_empty(key.shape)
    made[..., :DIM].copy_(key[..., :DIM])
    made[..., DIM:] = key[..., DIM:]
    return made, value, cache


def hidden(layer: Layer, x: Tensor, cache: Cache) -> Any:
    kept = grown(cache[0], x, 1)
    return heads(layer.k(kept)), heads(layer.v(kept)), (kept, None)


CACHES = [
    *(of_heads, of_features, one_tensor, turned, tokens_first, heads_in_batch),
    *(repeated, repeated_before, latent, filled, hidden),
]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [*((keys, 2) for keys in CACHES), (of_features, 1), (latent, 1)],
    ids=lambda given: getattr(given, "__name__", given),
)
@torch.no_grad()
def test_steps_and_chunks_equal_the_whole_pass(keys: Callable[..., Any], rows: int) -> None:
    model = Decoder(keys)
    ids = torch.randint(0, 99, (rows, N), generator=torch.Generator().manual_seed(1))
    dense = model(ids)[0]
    moonfx.sparsify(model, BLOCK, TOPK, compiler="eager", on_miss="raise")
    whole, _ = model(ids)
    assert float((whole - dense).abs().max()) > 1e-2
    parts, caches = [], ((None, None),) * 2
    for chunk in (ids[:, :15], ids[:, 15:22], ids[:, 22:23], ids[:, 23:]):
        out, caches = model(chunk.contiguous(), caches)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-6, rtol=1e-4)
    assert {r.action for r in moonfx.report(model).rows} == {"sparse"}


# --- what only looks like a step ------------------------------------------------------------------


class Pool(nn.Module):
    """One query over many keys: `operands(self, x, past)` gives both, before the heads."""

    def __init__(self, operands: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operands = operands
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.pooled = (
            nn.LayerNorm(WIDTH),
            nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        )
        self.query, self.null = (nn.Parameter(torch.randn(1, 1, WIDTH)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(N, WIDTH))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        query, key = self.operands(self, x, past)
        q, k = heads(query), heads(key)
        return F.scaled_dot_product_attention(q, k, k)


def wide(x: Tensor, of: Tensor) -> Tensor:
    return x.expand(len(of), -1, -1)


def after(m: Pool, past: Tensor, *tokens: Tensor) -> Tensor:
    """Keys of `tokens` behind those that a cache has."""
    return torch.cat([past, *(m.k(t) for t in tokens)], 1)


def pooled(m: Pool, past: Tensor) -> Tensor:
    """A token that has seen those before it."""
    latent = wide(m.query, past)
    return latent + m.pooled(latent, past, past)[0]


STEPS: list[tuple[str, Callable[..., Any]]] = [
    ("a cache", lambda m, x, past: (m.q(x), after(m, past, x))),
    ("norms of their own", lambda m, x, past: (m.q(m.norm(x)), after(m, past, x * 2))),
    (
        "registers first",
        lambda m, x, past: (m.q(x), torch.cat([wide(m.null, x), after(m, past, x)], 1)),
    ),
    ("an adapter", lambda m, x, past: (m.q(x) + m.v(m.q(x)), after(m, past, x))),
    (
        "some features",
        lambda m, x, past: (m.q(x)[..., list(range(WIDTH))[::-1]], after(m, past, x)),
    ),
    (
        "one row of the batch after the other",
        lambda m, x, past: (m.q(x.view(-1, WIDTH)).view(x.shape), after(m, past, x)),
    ),
]
LOOKALIKES: list[tuple[str, Callable[..., Any]]] = [
    (
        "a null key",
        lambda m, x, past: (wide(m.query, past), torch.cat([past, wide(m.null, past)], 1)),
    ),
    (
        "a projected null key",
        lambda m, x, past: (m.q(wide(m.query, past)), after(m, past, wide(m.null, past))),
    ),
    (
        "a learned query with a key of its own",
        lambda m, x, past: (m.q(wide(m.query, past)), after(m, past, wide(m.query, past))),
    ),
    (
        "pooling by what has pooled before",
        lambda m, x, past: (
            m.q(pooled(m, past)),
            torch.cat([m.k(past), m.k(pooled(m, past))], 1),
        ),
    ),
    (
        "a pooled token among all",
        lambda m, x, past: (
            m.q(token := pooled(m, past)),
            m.k(torch.cat([past, token], 1)),
        ),
    ),
    ("a null key for a token", lambda m, x, past: (m.q(x), torch.cat([past, wide(m.null, x)], 1))),
    (
        "a register last",
        lambda m, x, past: (m.q(x), torch.cat([after(m, past, x), wide(m.null, x)], 1)),
    ),
    ("another token", lambda m, x, past: (m.q(x), after(m, past, past[:, -1:]))),
    ("the token first", lambda m, x, past: (m.q(x), torch.cat([m.k(x), past], 1))),
    (
        "the first of two tokens",
        lambda m, x, past: (
            m.q(torch.cat([x, past[:, :1]], 1)[:, :1]),
            after(m, past, x, past[:, :1]),
        ),
    ),
    ("cross-attention", lambda m, x, past: (m.q(x), m.k(past))),
    ("more of another sequence", lambda m, x, past: (m.q(x), torch.cat([past, m.k(past)], 1))),
    ("other rows", lambda m, x, past: (m.q(x), after(m, past, x.flip(0)))),
    (
        "other rows, by views",
        lambda m, x, past: (
            m.q(x),
            after(m, past, x.view(2, 2, 1, WIDTH).transpose(0, 1).reshape(4, 1, WIDTH)),
        ),
    ),
    ("one row for all", lambda m, x, past: (m.q(x), after(m, past, wide(x[:1], x)))),
    ("a sum", lambda m, x, past: (m.q(x) + m.v(past[:, -1:]), after(m, past, x))),
    (
        "the same place",
        lambda m, x, past: (
            m.q(wide(m.query, past) + m.table[-1]),
            after(m, past, past[:, :1] + m.table[-1]),
        ),
    ),
    (
        "a prefix of this call",
        lambda m, x, past: (m.q(x), after(m, m.k(x + past[:, 1:]), x)),
    ),
    (
        "written to in between",
        lambda m, x, past: (m.q(y := x * 1), after(m, past, y.copy_(past[:, :1]))),
    ),
    ("mixed tokens", lambda m, x, past: (m.q(x), after(m, past, x + past.mean(1, keepdim=True)))),
]


def explained(operands: Callable[..., Any], dynamic: bool = False) -> str:
    model = Pool(operands)
    x, past = torch.randn(4, 1, WIDTH), torch.randn(4, N - 1, WIDTH)
    if dynamic:
        torch._dynamo.mark_dynamic(past, 1)
    report = moonfx.explain(model, x, past, block=BLOCK, topk=TOPK)
    return outcome(report)[-1]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("operands", [c for _, c in STEPS], ids=[name for name, _ in STEPS])
def test_a_query_appended_to_a_cache_is_causal(operands: Callable[..., Any], dynamic: bool) -> None:
    assert explained(operands, dynamic) == "causal"


@pytest.mark.parametrize(
    "operands", [c for _, c in LOOKALIKES], ids=[name for name, _ in LOOKALIKES]
)
def test_what_may_be_pooling_is_declined(operands: Callable[..., Any]) -> None:
    assert "not a cache that it was appended to" in explained(operands)


@pytest.mark.parametrize("name", ["a null key", "a register last", "another token"])
def test_what_may_be_pooling_of_any_length_is_declined(name: str) -> None:
    assert "not a cache that it was appended to" in explained(dict(LOOKALIKES)[name], dynamic=True)
