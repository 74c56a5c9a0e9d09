"""Whether attention is one step of decoding: one query, appended to keys of earlier tokens.

key = cat([past, new], tokens), new and the query of one token      it sees every key: causal

The cache may hold the keys, before or after their heads are split, turned or repeated, or what they
are a projection of: it is the last key that must be made of the query's token, and of no other.
That token must be new to the keys before it: what pools them has seen them already.
"""

from dataclasses import replace

import sympy

from moonfx.passes.context import Context
from moonfx.passes.masks.self_attention import (
    keys_of,
    queries_of,
    shared_tokens,
    tokens_above,
    tokens_of,
)
from moonfx.site import AttentionSite


def appended(site: AttentionSite, context: Context) -> bool:
    """Whether the one query's token is that of the last key, and no earlier key's."""
    keys = keys_of(site)
    earlier = sympy.expand(keys.count - 1)
    last = replace(keys, first=earlier, count=sympy.S.One)
    met = shared_tokens(queries_of(site), last, context)
    token = tokens_above(met, context, through_steps=False)
    past = tokens_of(replace(keys, count=earlier), context)
    return bool(token) and token.isdisjoint(past)
