"""Whether the operands of an attention site fit together."""

import torch

from moonfx.capture.sizes import hint, same_size
from moonfx.site import AttentionSite, Declined


def check_shapes(site: AttentionSite) -> None:
    """Fills in heads, lengths and head_dim.

    Raises:
        Declined: if the operator does not take the shapes.
    """
    query, key, value = (n.meta["val"] for n in (site.query, site.key, site.value))
    rank = 3 if site.folded else 4
    for name, node in (("query", site.query), ("key", site.key), ("value", site.value)):
        if len(node.meta["val"].shape) != rank:
            has = f"{name} has {len(node.meta['val'].shape)} dimensions, not {rank}"
            raise Declined(f"{has}; bring it to [batch, heads, tokens, head_dim]", node)
    key_shape = list(key.shape)
    if site.key_transposed:
        key_shape[-1], key_shape[-2] = key_shape[-2], key_shape[-1]
    heads, kv_heads = query.shape[1], key_shape[1]
    if site.folded:
        heads = kv_heads = site.heads or 1
    site.heads, site.kv_heads, site.head_dim = hint(heads), hint(kv_heads), hint(query.shape[-1])
    site.query_length, site.key_length = hint(query.shape[-2]), hint(key_shape[-2])
    # Sizes that dense attention itself needs equal are equal, whatever symbols they go by (each
    # tensor of a KV cache has its own); what it would broadcast is not.
    for name, other in (("key", key_shape), ("value", value.shape)):
        if same_size(other[0], 1) != same_size(query.shape[0], 1):
            raise Declined(f"{name} is broadcast over the batch", site.output)
        if site.folded and hint(other[0]) != hint(query.shape[0]):  # enable_gqa
            reason = f"{name} has fewer heads than query, which lie in the batch: unsqueeze(0)"
            raise Declined(reason, site.output)
    if not same_size(key_shape[-1], query.shape[-1]):
        raise Declined("query and key differ in head_dim", site.output)
    expected = [*query.shape[:-1], value.shape[-1]]
    if not all(map(same_size, site.output.meta["val"].shape, expected)):
        raise Declined("the mask or the keys broadcast the query to another shape", site.output)
    if not site.folded and not same_size(value.shape[1], key_shape[1]):
        raise Declined("key and value differ in heads", site.output)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        changes = "the number of heads is not a constant of the graph; make it an int of the module"
        raise Declined(changes, site.output)
    if heads % kv_heads:
        raise Declined(f"{heads} query heads are no multiple of {kv_heads} key heads", site.output)
    dtype = site.output.meta["val"].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        wrong = f"dtype {dtype} is not float32, bfloat16 or float16; model.float() makes it one"
        raise Declined(wrong, site.output)
