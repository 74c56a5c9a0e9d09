"""Roles by names and shapes, without a model."""

from typing import Any

import pytest

from moonfx.optim.roles.table import ROLES
from tests.support.optim.roles import HIDDEN, nameless

NAMES = [
    # name, shape, role, rule
    ("transformer.wte.weight", (99, 64), "embedding", "name"),
    ("transformer.wpe.weight", (99, 64), "position embedding", "name"),
    ("module._orig_mod.lm_head.weight", (99, 64), "head", "name"),
    ("shared.weight", (99, 64), "embedding", "name"),
    ("output.weight", (99, 64), "head", "name"),
    ("layers.0.attention.output.weight", (64, 64), HIDDEN, "shape"),
    ("decoder.multihead_attn.in_proj_weight", (192, 64), HIDDEN, "shape"),
    ("classifier.weight", (10, 64), "head", "name"),
    ("score.weight", (10, 64), "head", "name"),
    ("fc.weight", (10, 64), "head", "name"),
    ("h.0.ln_1.weight", (64,), "norm gain", "name"),
    ("h.0.ln_1.bias", (64,), "bias", "name"),
    ("layers.0.mixer.A_log", (64, 16), "scan parameter", "name"),
    ("layers.0.mixer.x_proj.weight", (40, 64), HIDDEN, "shape"),
    ("q_proj.lora_A.default.weight", (8, 64), "LoRA", "name"),
    ("q_proj.vblora_logits_A.default", (8, 16, 10), "LoRA", "name"),
    ("explorator.weight", (8, 64), HIDDEN, "shape"),
    ("parametrizations.weight.original0", (64, 1), "weight norm", "name"),
    ("mlp.experts.gate_up_proj", (4, 64, 32), "experts", "name"),
    ("mlp.gate_up_proj", (4, 64, 32), "unclear", "shape"),
    ("conv.weight", (8, 4, 3, 3), "convolution", "shape"),
    ("vit.patch_embed.proj.weight", (64, 3, 16, 16), "patch embedding", "name"),
    ("vit.to_patch_embedding.2.weight", (64, 48), "patch embedding", "name"),
    ("vit.patch_embed.norm.weight", (64,), "norm gain", "name"),
    ("swin.patch_merging.reduction.weight", (64, 128), HIDDEN, "shape"),
    ("vit.pos_embed", (1, 17, 64), "position embedding", "name"),
    ("vit.cls_token", (1, 1, 64), "thin matrix", "shape"),
    ("", (64, 64), HIDDEN, "shape"),
    ("", (50000, 64), "embedding", "shape"),
    ("", (256, 64), HIDDEN, "shape"),
    ("", (64,), "vector", "shape"),
    ("", (64, 1), "thin matrix", "shape"),
    ("", (), "vector", "shape"),
    ("_fsdp_wrapped_module._flat_param", (4096,), "vector", "name"),
]


@pytest.mark.parametrize(
    ("name", "shape", "role", "rule"), NAMES, ids=[f"{r[0]} {r[1]}" for r in NAMES]
)
def test_without_a_model_names_and_shapes_decide(
    name: str, shape: Any, role: str, rule: str
) -> None:
    row = nameless({name: shape})[name]
    assert (row.role, row.rule, row.optimizer) == (role, rule, ROLES[role].optimizer)


def test_flattened_shards_are_explained() -> None:
    row = nameless({"_fsdp_wrapped_module._flat_param": (4096,)})
    assert "use_orig_params=True" in row["_fsdp_wrapped_module._flat_param"].why
