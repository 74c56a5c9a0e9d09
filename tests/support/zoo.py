"""Small random models of the families that moonfx must rewrite, and an independent sparse oracle.

`build(name, form)` gives a model in eval mode, two layers, hidden size 64, 100 tokens, which maps
token ids [B, N] and an optional 2-D padding mask to logits [B, N, 100]. `oracle(model, ...)` is
what it gives with the reference put in place of its attention, through Hugging Face's own
interfaces or F.scaled_dot_product_attention: no graph and no pass of moonfx is involved.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention

WIDTH, HEADS, VOCABULARY, LENGTH = 64, 4, 100, 256

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_FALCON = {**_SIZES, "alibi": False, "hidden_dropout": 0.0, "attention_dropout": 0.0}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "n_positions": LENGTH,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "falcon_mqa": ("Falcon", {**_FALCON, "multi_query": True}),
    "falcon_gqa": ("Falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "bloom": (
        "Bloom",
        {
            **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
}


def build(name: str, form: str) -> nn.Module:
    """A model of the zoo, the same weights for every form. `form`: "eager" or "sdpa"."""
    torch.manual_seed(0)
    if name in ("nano", "mha"):
        return (NanoGPT(form) if name == "nano" else WithMultiheadAttention(form)).eval()
    family, sizes = _CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model_class = getattr(transformers, f"{family}{head}")
    return model_class._from_config(config, attn_implementation=form).eval()


def logits(model: nn.Module, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    """Logits [B, N, vocabulary] of either kind of model."""
    if isinstance(model, transformers.PreTrainedModel):
        return model(ids, attention_mask=padding, use_cache=False).logits
    return model(ids) if padding is None else model(ids, padding)


# --- models written by hand -----------------------------------------------------------------------


class NanoAttention(nn.Module):
    """The attention of karpathy/nanoGPT: one projection for q, k, v, and a tril buffer."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.flash = form == "sdpa"
        triangle = torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH)
        self.register_buffer("bias", triangle)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, HEADS, C // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.dropout(F.softmax(att, dim=-1), 0.1, self.training)
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Packed(nn.Module):
    """nn.MultiheadAttention with a causal mask; form "returned" adds the weights to the output."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.form = form

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(diagonal=1)
        hidden = None if padding is None else padding == 0
        y, weights = self.inner(
            x, x, x, key_padding_mask=hidden, need_weights=self.form != "sdpa", attn_mask=mask
        )
        return y + weights.sum(-1, keepdim=True) if self.form == "returned" else y


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x: Tensor, *padding: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), *padding)
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    attention: type[nn.Module] = NanoAttention

    def __init__(self, form: str) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block(self.attention(form)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, *padding: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x, *padding)
        return self.head(x)


class WithMultiheadAttention(NanoGPT):
    attention = Packed


# --- the oracle -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reference_sdpa(block: int, topk: int, sinks: int, calls: list[int]) -> Iterator[None]:
    """F.scaled_dot_product_attention by the reference; the last query's row says who is real."""

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        calls.append(1)
        real = None
        if attn_mask is not None:
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            real = keep[:, 0, -1, :].expand(query.shape[0], -1)
        return moba_attention(
            query, key, value, MobaArguments(block, topk, sinks=sinks, scale=scale, key_mask=real)
        )[0]

    with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
        yield


def oracle(
    name: str, ids: Tensor, padding: Tensor | None, block: int, topk: int, sinks: int
) -> tuple[Tensor, int]:
    """Logits of a zoo model whose every attention is the reference, and how often it was called."""
    calls: list[int] = []
    if name in ("nano", "mha", "falcon_mqa", "falcon_gqa"):  # deaf to the attention interface
        model = build(name, "sdpa")
        with _reference_sdpa(block, topk, sinks, calls):
            return logits(model, ids, padding), len(calls)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **other: Any,
    ) -> tuple[Tensor, None]:
        calls.append(1)
        out, _ = moba_attention(
            query,
            key,
            value,
            MobaArguments(block, topk, sinks=sinks, scale=scaling, key_mask=attention_mask),
        )
        return out.transpose(1, 2), None

    def mask(*given: Any, attention_mask: Tensor | None = None, **other: Any) -> Tensor | None:
        return attention_mask

    AttentionInterface.register("moonfx_reference", attend)
    AttentionMaskInterface.register("moonfx_reference", mask)
    model = build(name, "eager")
    model.set_attn_implementation("moonfx_reference")  # type: ignore[operator]
    return logits(model, ids, padding), len(calls)
