"""Writes one MoBA operator for each attention site that the policy makes sparse.

    before  query, key, value -> (dense attention with its mask) -> output [B, Hq, Nq, Dv]
    after   moonfx::moba_attention(query, key, value, block, topk, sinks, scale, key_mask, causal,
                                   softcap, key_bias, segments, None, recompute)[0]

What was proved of the mask becomes key_mask [B, Nk], segments [B, Nk] and key_bias [B, Hq, Nk],
written from the mask's own leaves; the dense [B, 1, Nq, Nk] mask is left without users and is
removed with the rest of the dead nodes. Heads that lie in the batch are told apart where their
number is known. Attention sink logits s need no kernel: out * sigmoid(lse - s).
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from moonfx.capture.sizes import fake_values
from moonfx.passes.attention import output_strides as layout
from moonfx.passes.attention.keyless_queries import keep_keyless
from moonfx.passes.attention.logsumexp import give_lse
from moonfx.passes.attention.mask_operands import CannotWrite, Writer, Written
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import call, in_order
from moonfx.passes.graph.walks import upstream
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite, Declined

aten = torch.ops.aten

OPERATOR = torch.ops.moonfx.moba_attention.default


def run(graph: fx.Graph, context: Context) -> int:
    """Rewrites the supported sites of the graph; returns how many."""
    rewritten = 0
    written: Written = {}
    for site in context.sites:
        if site.output.graph is not graph or site.reject is not None or not site.laid_out:
            continue
        policy = context.policy(site, context.sites, context.root)
        if not isinstance(policy, LayerPolicy):
            site.action = policy
            continue
        site.policy = policy
        try:
            context.verdicts.check(site)
            _note_proofs(site, context)
            rewrite(site, policy, written, context)
        except Declined as reason:
            context.decline(site, reason)
            continue
        except (CannotWrite, layout.CannotKeep) as reason:
            context.decline(site, Declined(str(reason), site.output))
            continue
        site.action, rewritten = "sparse", rewritten + 1
    if rewritten:
        # once: what was put in writes nowhere, and comes before what is left
        context.changed(graph)
    return rewritten


def rewrite(site: AttentionSite, policy: LayerPolicy, written: Written, context: Context) -> None:
    """Replaces one site's output by the operator."""
    old = site.output
    dtype = old.meta["val"].dtype
    with old.graph.inserting_before(old), fake_values(context.gm):
        named = {
            **_of_the_mask(site, written, context),
            **_operands(site, dtype),
            "block": policy.block,
            "topk": policy.topk,
            "sinks": policy.sinks,
            "scale": site.scale,
            "softcap": site.softcap,
            "recompute": context.recompute_routing,
        }
        both = call(OPERATOR, *in_order(OPERATOR, named, least="key_mask"))
        new = call(operator.getitem, both, 0)
        made = [both, new]
        new = keep_keyless(new, both, named, site, context)
        if site.sink_logits is not None:
            new = _with_sink_logits(new, both, site.sink_logits, dtype)
            made.append(new)
        if site.unfolds:
            new = call(aten.flatten.using_ints, new, 0, 1)
        elif site.folded:
            new = call(aten.squeeze.dim, new, 1)
        new = layout.keep(old, new, context)
        if site.lse is not None:
            give_lse(site.lse, both, old, context)
    for node in (*made, new):
        node.meta.update(
            {k: old.meta[k] for k in ("stack_trace", "nn_module_stack") if k in old.meta}
        )
    context.replaced(old, new)
    site.output = new


def _note_proofs(site: AttentionSite, context: Context) -> None:
    """Keeps the constants between the site's operands and its output, and in its masks."""
    ends = {site.query, site.key, site.value}

    def inputs(node: fx.Node) -> Iterable[fx.Node]:
        outside = context.nesting.outer(node)
        return node.all_input_nodes if outside is None else [outside]

    start = [site.output, *(mask for mask, _ in site.masks)]
    reached = upstream(start, stop=ends.__contains__, inputs=inputs)
    for node, values in context.reader.constants.items():
        if node in reached:
            context.proofs[node] = values


def _of_the_mask(site: AttentionSite, written: Written, context: Context) -> dict[str, Any]:
    """What was proved of the mask, by the operator's names."""
    mask, write = site.mask, Writer(site, context, written)
    assert mask is not None
    return {
        "causal": mask.causal,
        "key_mask": write.key_mask(mask.padding) if mask.padding is not None else None,
        "key_bias": write.key_bias(mask.bias.value) if mask.bias is not None else None,
        "segments": write.segments(mask.segments) if mask.segments is not None else None,
    }


def _operands(site: AttentionSite, dtype: torch.dtype) -> dict[str, fx.Node]:
    """query, key and value, tokens before features, the query scaled by what the graph computes."""
    query, key = site.query, site.key
    if site.key_transposed:
        key = call(aten.transpose.int, key, -2, -1)
    for factor, how in site.factors:
        query = call(aten.mul.Tensor if how == "mul" else aten.div.Tensor, query, factor)
    operands = {"query": query, "key": key, "value": site.value}
    return {name: _as_operand(node, site, dtype) for name, node in operands.items()}


def _as_operand(node: fx.Node, site: AttentionSite, dtype: torch.dtype) -> fx.Node:
    """[B, H, N, D] in the dtype of the output; heads that lie in the batch are told apart."""
    if site.unfolds:
        node = call(aten.unflatten.int, node, 0, [-1, site.heads])
    elif site.folded:
        node = call(aten.unsqueeze.default, node, 1)
    return node if node.meta["val"].dtype == dtype else call(aten.to.dtype, node, dtype)


def _with_sink_logits(out: fx.Node, both: fx.Node, logits: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Attention whose denominator has exp(logit of the head) more."""
    lse = call(operator.getitem, both, 1)
    heads = lse.meta["val"].shape[1]
    given = logits.meta["val"].numel()
    if given not in (1, heads):
        raise CannotWrite("sink logits of heads that lie in the batch and cannot be told apart")
    logits = call(aten.reshape.default, logits, [given, 1])
    sink = call(aten.to.dtype, logits, torch.float32)
    share = call(aten.sigmoid.default, call(aten.sub.Tensor, lse, sink))
    kept = call(aten.mul.Tensor, out, call(aten.unsqueeze.default, share, -1))
    return call(aten.to.dtype, kept, dtype)
