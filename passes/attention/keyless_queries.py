"""Gives keyless queries, from which all keys are hidden, what the author's masks give them.

    before  out, lse = moba_attention(...)                       0 and -inf for a keyless query
    after   where(lse == -inf, value.mean(tokens), out)          under masks of finfo.min, say

Where the mask was added to the scores, a gradient enters them although nothing of them is left in
the output. scale * query @ (key^T @ (value - mean) / Nk) has the same one, and is added to the mean
less its own value. That is exact where the scores are linear: not under a softcap.

Shape letters: B batch, Hq query heads, Hkv key heads, Nq queries, Nk keys, Dv value dim.
"""

import operator
from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import same_size
from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import call
from moonfx.passes.masks.keyless import Keyless, keyless
from moonfx.site import AttentionSite

aten = torch.ops.aten


def keep_keyless(
    out: fx.Node, both: fx.Node, named: dict[str, Any], site: AttentionSite, context: Context
) -> fx.Node:
    """The output with keyless queries as they were; notes on the site that they are not.

    Args:
        out: the operator's output [B, Hq, Nq, Dv].
        both: the operator's call.
        named: its arguments by name.
    """
    given = keyless(site, context)
    if given is Keyless.ZERO:
        return out
    trains = context.mode(site.output).gradients
    if given is Keyless.UNKNOWN or (trains and _loses_gradients(given, named, site, context)):
        site.zeroes_keyless = True
        return out
    instead = _for_query_heads(call(aten.mean.dim, named["value"], [2], True), out)
    if trains and given is Keyless.MEAN:
        through = _through_scores(named, out)
        nothing = call(aten.sub.Tensor, through, call(aten.detach.default, through))
        instead = call(aten.add.Tensor, instead, call(aten.to.dtype, nothing, _dtype(out)))
    lse = call(aten.unsqueeze.default, call(operator.getitem, both, 1), -1)
    return call(aten.where.self, call(aten.eq.Scalar, lse, -torch.inf), instead, out)


def _loses_gradients(
    given: Keyless, named: dict[str, Any], site: AttentionSite, context: Context
) -> bool:
    """Whether a softcap bends scores that are differentiated, or a bias in them is trained."""
    if given is Keyless.MEAN and site.softcap:
        return True
    bias = named["key_bias"]
    if bias is None:
        return False
    memory = Memory(bias.graph, context.nesting.call_of(bias.graph) is None)
    return context.gradients.needed(bias, memory)


def _through_scores(named: dict[str, Any], out: fx.Node) -> fx.Node:
    """What one query's scores weigh, to first order: float32 [B, Hq, Nq, Dv]."""
    names = ("query", "key", "value")
    query, key, value = (call(aten.to.dtype, named[name], torch.float32) for name in names)
    spread = call(aten.sub.Tensor, value, call(aten.mean.dim, value, [2], True))
    keys = value.meta["val"].shape[2]
    count = keys if isinstance(keys, int) else call(aten.sym_size.int, value, 2)
    share = call(aten.div.Tensor, call(aten.detach.default, spread), count)
    weighed = call(aten.matmul.default, call(aten.transpose.int, key, 2, 3), share)
    scale = named["scale"]
    factor = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    scaled = call(aten.mul.Tensor, query, factor)
    return call(aten.matmul.default, scaled, _for_query_heads(weighed, out))


def _for_query_heads(node: fx.Node, out: fx.Node) -> fx.Node:
    """[B, Hkv, ..] as [B, Hq, ..]."""
    heads, wanted = node.meta["val"].shape[1], out.meta["val"].shape[1]
    if same_size(heads, wanted):
        return node
    return call(aten.repeat_interleave.self_int, node, wanted // heads, 1)


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found
