"""Masks as functions of lengths and padding, traced around an attention, and what is proved."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.attention import find_attention, lay_out_heads
from moonfx.passes.context import Context
from moonfx.passes.masks import classify_mask
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite
from tests.passes.attention.forms import NEG

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
