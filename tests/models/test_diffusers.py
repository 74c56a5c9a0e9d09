"""Joint attention of two streams, as Diffusers' transformers have it: text beside an image."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moonfx
from tests.passes.attention.forms import outcome

diffusers = pytest.importorskip(
    "diffusers", reason="needs Diffusers: pip install --no-deps diffusers==0.42.1"
)

ROWS, TEXT, WIDTH = 2, 7, 32
SHARED = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    """One block of two streams, then one of the streams joined."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=[4, 4, 8],
        **SHARED,
    )
    image = {"hidden_states": torch.randn(ROWS, 16, 4), "img_ids": torch.zeros(16, 3)}
    return model, image | {"txt_ids": torch.zeros(TEXT, 3)}


def stable_diffusion() -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        **SHARED,
    )
    return model, {"hidden_states": torch.randn(ROWS, 4, 8, 8)}


@pytest.mark.parametrize("make", [flux, stable_diffusion], ids=lambda make: make.__name__)
@torch.no_grad()
def test_joint_attention_of_text_and_image_is_self_attention(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    inputs["encoder_hidden_states"] = torch.randn(ROWS, TEXT, WIDTH)
    inputs["pooled_projections"] = torch.randn(ROWS, WIDTH)
    inputs["timestep"] = torch.tensor([1.0, 2.0])
    model.eval()
    dense = model(**inputs).sample
    results = []
    for topk in (6, 2):  # of 23 tokens
        moonfx.sparsify(model, 4, topk, compiler="eager", on_miss="raise", causal_only=False)
        results.append(model(**inputs).sample)
        assert outcome(moonfx.report(model)) == ["all"] * 2
    torch.testing.assert_close(results[0], dense, atol=5e-6, rtol=1e-4)
    assert float((results[1] - dense).abs().max()) > 1e-4
