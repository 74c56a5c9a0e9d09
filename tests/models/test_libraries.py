"""Attention as torch.nn, x-transformers and much hand-written code spell it is found, or declined.

Each row: the model, its input, and of each attention, in the order in which they run, the beginning
of "sparse: what its mask was proved to be, modifiers" or of "declined: why".
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from moonfx.report.attention import Row
from moonfx.report.report import Report
from tests.support.agreement import LENGTH, ROUNDING, Tolerance, compiled

WIDTH, HEADS, HEAD_DIM = 32, 4, 8

CAUSAL = "sparse: causal"
PADDED = "sparse: causal & padding"
BOTH_WAYS = "sparse: all"
BIDIRECTIONAL = "declined: bidirectional"


def vectors(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def short_rows() -> Tensor:
    """True at the real tokens: the second row is shorter, and padded at its end."""
    return torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [LENGTH - 19]])


def says(row: Row) -> str:
    kept = f", {row.modifiers}" if row.modifiers else ""
    return f"sparse: {row.mask}{kept}" if row.action == "sparse" else f"{row.action}: {row.reason}"


def assert_says(report: Report, expected: list[str]) -> None:
    found = [says(row) for row in report.rows]
    assert report.failures == []
    assert len(found) == len(expected), found
    for one, wanted in zip(found, expected, strict=True):
        exact = wanted.startswith("sparse")
        assert one == wanted if exact else one.startswith(wanted), found


# --- torch.nn -------------------------------------------------------------------------------------


class Multihead(nn.Module):
    """nn.MultiheadAttention, called with whatever a row says; masks are made in the model."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.call, self.memory = call, call.pop("memory", None)
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Any:
        x = x if self.inner.batch_first else x.transpose(0, 1)
        other = x if self.memory is None else self.memory
        given = {k: v() if callable(v) else v for k, v in self.call.items()}
        y, weights = self.inner(x, other, other, **given)
        return y if weights is None or weights.dtype == torch.bool else (y, weights)


ADDED = nn.Transformer.generate_square_subsequent_mask(LENGTH)


def hidden() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def added() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(LENGTH)


PADDING = ~short_rows()
MEMORY = vectors(length=50)
HINTED = {"attn_mask": added, "is_causal": True}
OTHER = {"kdim": 16, "vdim": 16}


def causal_encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class PaddedEncoder(nn.Module):
    """An encoder that makes its mask: of one that is given, nothing is known for other shapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = causal_encoder(**options)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        y = self.encoder(x, mask=added(), is_causal=True, src_key_padding_mask=~real)
        return y * real[..., None]


def decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, **options)
    return nn.TransformerDecoder(layer, 2)


def encode(model: nn.Module) -> Any:
    return model(vectors(), mask=ADDED, is_causal=True)


def encode_both_ways(model: nn.Module) -> Any:
    return model(vectors())


def decode(model: nn.Module) -> Any:
    return model(vectors(), MEMORY, tgt_mask=ADDED, tgt_is_causal=True)


def padded(model: nn.Module) -> Any:
    return model(vectors(), short_rows())


def mha(options: dict[str, Any] | None = None, **call: Any) -> Callable[[], nn.Module]:
    return lambda: Multihead({"need_weights": False, **call}, **(options or {}))


def direct(model: nn.Module) -> Any:
    return model(vectors())


USED = "declined: the probabilities are also used"
TORCH = [
    # name, model, call, report
    ("mha, bool mask", mha(attn_mask=hidden), direct, [CAUSAL]),
    ("mha, added mask", mha(attn_mask=added), direct, [CAUSAL]),
    ("mha, hint", mha(**HINTED), direct, [CAUSAL]),
    ("mha, sequence first", mha({"batch_first": False}, **HINTED), direct, [CAUSAL]),
    ("mha, weights", mha(attn_mask=hidden, need_weights=True), direct, [USED]),
    ("mha, padding", mha(attn_mask=hidden, key_padding_mask=PADDING), direct, [PADDED]),
    ("mha, bias_kv", mha({"add_bias_kv": True}, attn_mask=hidden), direct, ["declined: "]),
    ("mha, zero_attn", mha({"add_zero_attn": True}, attn_mask=hidden), direct, ["declined: "]),
    ("mha, kdim", mha(OTHER, attn_mask=hidden, memory=vectors()[..., :16]), direct, [CAUSAL]),
    ("mha, cross", mha(memory=MEMORY), direct, [BIDIRECTIONAL]),
    ("mha, eval", lambda: mha(**HINTED)().eval(), direct, [CAUSAL]),
    ("mha, both ways", mha(), direct, [BIDIRECTIONAL]),
    ("encoder", causal_encoder, encode, [CAUSAL] * 2),
    ("encoder, norm first", lambda: causal_encoder(norm_first=True), encode, [CAUSAL] * 2),
    ("encoder, eval", lambda: causal_encoder().eval(), encode, [CAUSAL] * 2),
    ("encoder, padding", PaddedEncoder, padded, [PADDED] * 2),
    ("encoder, padding, eval", lambda: PaddedEncoder().eval(), padded, [PADDED] * 2),
    ("decoder", decoder, decode, [CAUSAL, BIDIRECTIONAL] * 2),
]
ASKED = [
    ("mha", mha(), direct, [BOTH_WAYS]),
    ("encoder", causal_encoder, encode_both_ways, [BOTH_WAYS] * 2),
    ("decoder", lambda: decoder(norm_first=True), decode, [CAUSAL, "declined: "] * 2),
]


@pytest.mark.parametrize(
    ("make", "call", "expected"), [r[1:] for r in TORCH], ids=[r[0] for r in TORCH]
)
def test_the_layers_of_torch_nn(make, call, expected) -> None:
    assert_says(compiled(make(), call), expected)


@pytest.mark.parametrize(
    ("make", "call", "expected"), [r[1:] for r in ASKED], ids=[r[0] for r in ASKED]
)
def test_the_layers_of_torch_nn_without_causal_only(make, call, expected) -> None:
    assert_says(compiled(make(), call, causal_only=False), expected)


def test_explain_sees_into_a_layer_of_torch_nn_that_is_the_whole_model() -> None:
    """Dynamo passes over a function of torch itself that nothing calls."""
    plan = moonfx.explain(causal_encoder(), vectors(), mask=ADDED, is_causal=True, block=16, topk=2)
    assert_says(plan, [CAUSAL] * 2)


# --- written by hand ------------------------------------------------------------------------------


class Projected(nn.Module):
    """Queries, keys and values by one linear layer, and the output's own."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv_heads * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        kv = self.kv_heads * HEAD_DIM
        return self.qkv(x).split((WIDTH, kv, kv), dim=-1)


class Lucidrains(Projected):
    """einops and einsum, as in lucidrains' repositories; one key head is a tensor without heads."""

    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange, repeat

        q, k, v = self.split(x)
        q = rearrange(q, "b n (h d) -> b h n d", h=HEADS) * HEAD_DIM**-0.5
        if self.kv_heads > 1:
            k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.kv_heads) for t in (k, v))
            groups = HEADS // self.kv_heads
            k, v = (repeat(t, "b h n d -> b (h g) n d", g=groups) for t in (k, v))
        keys = "b h j d" if self.kv_heads > 1 else "b j d"
        scores = torch.einsum(f"b h i d, {keys} -> b h i j", q, k)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type(scores.dtype)
        out = torch.einsum(f"b h i j, {keys} -> b h i d", weights, v)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))


class ViT(Projected):
    """The attention of timm's VisionTransformer: norms of queries and keys, fused or not."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, HEAD_DIM**-0.5
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            weights = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(weights.softmax(dim=-1)) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, c))


class NanoGPT(Projected):
    """The attention of nanoGPT before flash: a tril buffer and a scale by the square root."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(96, 96)).view(1, 1, 96, 96))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, HEADS, HEAD_DIM).transpose(1, 2) for t in self.split(x))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        y = F.softmax(weights, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, n, c))


HAND = [
    ("lucidrains", Lucidrains, True, [CAUSAL]),
    ("lucidrains, two key heads", lambda: Lucidrains(2), True, [CAUSAL]),
    ("lucidrains, one key head", lambda: Lucidrains(1), True, [CAUSAL]),
    ("vit, fused", lambda: ViT(True), False, [BOTH_WAYS]),
    ("vit, unfused", lambda: ViT(False), False, [BOTH_WAYS]),
    ("vit, not asked", lambda: ViT(True), True, [BIDIRECTIONAL]),
    ("nanoGPT", NanoGPT, True, [CAUSAL]),
]


@pytest.mark.parametrize(
    ("make", "causal_only", "expected"), [r[1:] for r in HAND], ids=[r[0] for r in HAND]
)
def test_attention_written_by_hand(make, causal_only, expected) -> None:
    pytest.importorskip("einops", reason="needs einops, pinned in requirements.txt")
    assert_says(compiled(make(), direct, causal_only=causal_only), expected)


# --- x-transformers -------------------------------------------------------------------------------

X = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def x_transformer(encoder: bool = False, **options: Any) -> Callable[[], nn.Module]:
    """A language model of one layer, in eval mode."""

    def make() -> nn.Module:
        pytest.importorskip(
            "x_transformers", reason="needs x-transformers, pinned in requirements.txt"
        )
        from x_transformers import Decoder, Encoder, TransformerWrapper

        kind = Encoder if encoder else Decoder
        layers = kind(dim=WIDTH, depth=1, heads=HEADS, attn_dim_head=HEAD_DIM, **options)
        return TransformerWrapper(num_tokens=50, max_seq_len=128, attn_layers=layers).eval()

    return make


def ids(model: nn.Module) -> Any:
    return model(X)


def ids_padded(model: nn.Module) -> Any:
    return model(X, mask=short_rows()) * short_rows()[..., None]


XT = [
    # name, options, call, report
    ("plain", {}, ids, [CAUSAL]),
    ("flash", {"attn_flash": True}, ids, [CAUSAL]),
    ("rotary", {"rotary_pos_emb": True}, ids, [CAUSAL]),
    ("padding", {}, ids_padded, [PADDED]),
    ("padding, flash", {"attn_flash": True}, ids_padded, [PADDED]),
    ("grouped heads", {"attn_kv_heads": 2}, ids, [CAUSAL]),
    ("one key head", {"attn_one_kv_head": True}, ids, [CAUSAL]),
    ("one key head, flash", {"attn_one_kv_head": True, "attn_flash": True}, ids, [CAUSAL]),
    ("norms of q and k", {"attn_qk_norm": True}, ids, [CAUSAL]),
    ("latent keys", {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16}, ids, [CAUSAL]),
    ("memory keys", {"attn_num_mem_kv": 4}, ids, [CAUSAL]),
    ("a key of zeros", {"attn_add_zero_kv": True, "attn_flash": True}, ids, [CAUSAL]),
    ("softcap", {"attn_softclamp_logits": True}, ids, [CAUSAL + ", softcap 50"]),
    ("sink logits", {"attn_head_learned_sink": True}, ids, ["declined: the attention sink logits"]),
    ("ALiBi", {"alibi_pos_bias": True}, ids, ["declined: additive bias"]),
    ("T5 positions", {"rel_pos_bias": True}, ids, ["declined: additive bias"]),
    ("dynamic positions", {"dynamic_pos_bias": True}, ids, ["declined: additive bias"]),
    ("talking heads", {"attn_pre_talking_heads": True}, ids, ["declined: the scores are used"]),
    ("talking heads, after", {"attn_post_talking_heads": True}, ids, ["declined: 'conv2d' stands"]),
    ("distances", {"attn_l2_distance": True}, ids, ["declined: the scores are a distance"]),
    ("keys by topk", {"attn_sparse_topk": 8}, ids, ["declined: the scores are used"]),
    ("selective", {"attn_selective": True}, ids, ["declined: the scores are used"]),
    ("window", {"attn_max_attend_past": 16}, ids, ["declined: "]),
    ("sigmoid", {"attn_sigmoid": True}, ids, []),
    ("encoder", {"encoder": True}, ids, [BIDIRECTIONAL]),
]


@pytest.mark.parametrize(
    ("options", "call", "expected"), [r[1:] for r in XT], ids=[r[0] for r in XT]
)
def test_x_transformers(options, call, expected) -> None:
    # Norms of queries and keys make scores of 10, and their softmax as much steeper.
    close = Tolerance(gradient=2e-5) if "attn_qk_norm" in options else ROUNDING
    assert_says(compiled(x_transformer(**options)(), call, close), expected)


def test_an_x_transformers_encoder_without_causal_only() -> None:
    made = x_transformer(encoder=True)()
    assert_says(compiled(made, ids_padded, causal_only=False), ["sparse: all & padding"])
