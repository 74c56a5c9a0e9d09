"""Whether attention is one step of decoding: one query, appended to a cache of keys.

key = cat([past, new], tokens), new with one token        the last token sees every key: causal
"""

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.graph.operators import COPIES
from moonfx.site import AttentionSite

aten = torch.ops.aten
_LOOK_THROUGH = COPIES | {aten.to.dtype}


def appended(site: AttentionSite) -> bool:
    """Whether the key is torch.cat([past, new], token dim) with one new token."""
    key, dim = site.key, -1 if site.key_transposed else -2
    while key.target in _LOOK_THROUGH:
        source = key.args[0]
        assert isinstance(source, fx.Node)
        key = source
    if getattr(key.target, "__name__", "") != "cat.default":
        return False
    parts = key.args[0]
    at = key.args[1] if len(key.args) > 1 else key.kwargs.get("dim", 0)
    rank = len(key.meta["val"].shape)
    if not (isinstance(parts, list | tuple) and isinstance(at, int) and at % rank == dim % rank):
        return False
    last = parts[-1]
    return isinstance(last, fx.Node) and same_size(last.meta["val"].shape[dim], 1)
