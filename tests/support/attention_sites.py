"""Sites and rows of one attention of 8 query heads and 2 key heads, and what differs from it."""

from dataclasses import asdict

from torch import fx

from moonfx.policy import LayerPolicy
from moonfx.report.attention import Row
from moonfx.site import AttentionSite, Mask

SPARSE = Row(
    layer="layers.0.attn",
    line="model.py:12",
    form="sdpa",
    mask="causal",
    modifiers="",
    heads=8,
    kv_heads=2,
    head_dim=64,
    action="sparse",
    block=128,
    topk=3,
    sinks=1,
    reason="",
    queries=1024,
    keys=1024,
)


def changed(**fields: object) -> Row:
    return Row(**{**asdict(SPARSE), **fields})


def site(layer: str, keys: int = 1024, **fields: object) -> AttentionSite:
    node = fx.Graph().placeholder("q")
    made = AttentionSite(node, node, node, node, "sdpa", layer, "model.py:12")
    made.heads, made.kv_heads, made.head_dim = 8, 2, 64
    made.query_length = made.key_length = keys
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def sparse_site(layer: str, keys: int = 1024) -> AttentionSite:
    policy = LayerPolicy(128, 3, 1)
    return site(layer, keys, mask=Mask("causal"), action="sparse", policy=policy)
