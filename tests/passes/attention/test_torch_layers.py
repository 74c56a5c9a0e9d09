"""torch.nn's own attention layers, in training and in inference, where torch fuses them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moonfx.passes.attention import find_attention
from moonfx.passes.context import Context
from tests.passes.attention.forms import B, H, N, outcome, run

E = 32


def hidden() -> Tensor:
    """A float mask [N, N], as nn.Transformer.generate_square_subsequent_mask makes it."""
    return torch.triu(torch.full((N, N), -torch.inf), diagonal=1)


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, attn_mask=hidden(), need_weights=self.need_weights)
        return out


class Encoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, mask=hidden(), src_key_padding_mask=padding, is_causal=True)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory, tgt_mask=hidden(), tgt_is_causal=True)


def sequence(seed: int = 0) -> Tensor:
    return torch.randn(B, N, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "none"])
def test_multihead_attention_is_found_with_its_heads(need_weights: bool, training: bool) -> None:
    """Weights that nobody reads are no weights: torch then writes the softmax out."""
    model = SelfAttention(need_weights).train(training)
    with torch.set_grad_enabled(training):
        dense = model(sequence())
        out, report = run(model, sequence())
    form = "baddbmm + softmax" if need_weights else "sdpa"
    rows = [(r.form, r.mask, r.heads, r.kv_heads, r.head_dim) for r in report.rewritten]
    assert rows == [(form, "causal", H, H, E // H)]
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_an_encoder_is_found_in_inference_too_with_its_padding(training: bool) -> None:
    model = Encoder().train(training)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, -5:] = True
    with torch.set_grad_enabled(training):
        torch.backends.mha.set_fastpath_enabled(False)  # which gives 0 for padding
        dense = model(sequence(), padding)
        torch.backends.mha.set_fastpath_enabled(True)
        out, report = run(model, sequence(), padding)
    assert outcome(report) == ["causal & padding", "causal & padding"]
    torch.testing.assert_close(out[~padding], dense[~padding], atol=5e-6, rtol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_decoder_attends_itself_sparsely_and_its_memory_densely() -> None:
    model = Decoder()
    given = sequence(), sequence(1)
    dense = model(*given)
    out, report = run(model, *given)
    assert [(r.action, r.mask) for r in report.rows] == [("sparse", "causal"), ("declined", "")]
    torch.testing.assert_close(out, dense, atol=5e-6, rtol=1e-5)


def test_a_fused_layer_that_is_in_a_graph_all_the_same_is_declined_with_the_way_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = sequence()
    node = graph.call_function(torch.ops.aten._transformer_encoder_layer_fwd.default, (x,))
    graph.output(node)
    context = Context(fx.GraphModule({}, graph), lambda site, sites, root: "dense")
    assert find_attention.run(context.gm.graph, context) == 0
    (site,) = context.sites
    assert "torch.backends.mha.set_fastpath_enabled(False)" in str(site.reject)


def test_fused_operators_of_torch_are_read_like_sdpa() -> None:
    class Fused(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            mask = torch.where(hidden() == 0, 0.0, -torch.inf)
            return flash(q, k, v, attn_mask=mask[None, None], scale=0.2)[0]

    q, k, v = (sequence(i).view(B, N, H, E // H).transpose(1, 2) for i in range(3))
    out, report = run(Fused(), q, k, v)
    assert outcome(report) == ["causal"]
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
