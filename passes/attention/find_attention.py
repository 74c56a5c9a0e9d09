"""Finds dense softmax attention, however it is written, or says why a look-alike is not it.

    before  softmax(mask(scale(query @ key^T)), dim=-1) @ value, or one scaled_dot_product_attention
    after   the same graph, and an AttentionSite for each, with the reason where it is declined

Anchors on scaled_dot_product_attention and softmax nodes and parses outwards by the grammar of
`scores.py` and `probabilities.py`. Every constant is read from the node that carries it. A softmax
of no product, or one that enters no product (a router, a loss), is no site and is passed over.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import is_higher_order, module_path, opaque_body, source_line
from moonfx.passes.attention import fused_operators as fused
from moonfx.passes.attention.external_users import check_users
from moonfx.passes.attention.key_transpose import check_token_major
from moonfx.passes.attention.nan_guards import check_guard
from moonfx.passes.attention.opaque_bodies import attentions_inside, attentions_on_subclasses
from moonfx.passes.attention.probabilities import (
    Product,
    check_product,
    product_beyond,
    product_of,
)
from moonfx.passes.attention.scores import Scores, parse_scores
from moonfx.passes.attention.sink_logits import cuts_off
from moonfx.passes.attention.softmax import Softmax, logarithm_of, read_softmax
from moonfx.passes.attention.upstream import reaches_product
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import operator_name
from moonfx.passes.graph.operators import EXP, LOG_SOFTMAX, POWERS, SOFTMAX
from moonfx.site import AttentionSite, Declined

aten = torch.ops.aten

_ON_SUBCLASS = {
    "NestedTensor": "attention of jagged nested tensors is not read: pack the sequences in one "
    "row, with position_ids or segment ids, or pad them",
}
_ON_OTHERS = "attention of {0}s is not read, whose inside no pass sees: call it on plain tensors"

# Reads the rest of a site; whether it is attention at all, or Declined.
Parse = Callable[[AttentionSite], bool]


def run(graph: fx.Graph, context: Context) -> int:
    """Appends to context.sites each attention of the graph, declined ones included."""
    found = 0
    for node in graph.nodes:
        for site, parse in _anchored(node, context):
            try:
                if not parse(site):
                    continue
                found += 1
            except Declined as reason:
                context.decline(site, reason)
            context.sites.append(site)
    assert isinstance(graph.owning_module, fx.GraphModule)
    for node, kind in attentions_on_subclasses(graph.owning_module):
        site = _site(node, context, operator_name(node))
        context.decline(site, Declined(_ON_SUBCLASS.get(kind, _ON_OTHERS.format(kind)), node))
        context.sites.append(site)
    return found


def _anchored(node: fx.Node, context: Context) -> Iterator[tuple[AttentionSite, Parse]]:
    """What begins at a node and may be attention, and how to read on."""
    if node.op != "call_function":
        return
    if fused.is_attention(node):
        yield _site(node, context, fused.name_of(node)), functools.partial(_fused, node)
    elif node.target in SOFTMAX | EXP | POWERS:
        softmax = read_softmax(node)
        product = None if softmax is None else product_of(softmax, context)
        if softmax is not None and product is not None:
            site = _site(node, context, "softmax", output=product.node, value=product.value)
            yield site, functools.partial(_by_hand, node, softmax, product, context)
        elif node.target in EXP | POWERS and (why := _by_exponentials(node)) is not None:
            yield _site(node, context, "exp"), functools.partial(_refuse, why)
    elif is_higher_order(node):
        yield from _opaque(node, context)


def _site(node: fx.Node, context: Context, form: str, **found: Any) -> AttentionSite:
    call = None if node.meta.get("nn_module_stack") else context.nesting.call_of(node.graph)
    anchor = node if call is None else call
    operands = {"query": node, "key": node, "value": node, "output": node, **found}
    return AttentionSite(
        form=form,
        layer=context.nesting.in_this_call(node, module_path(anchor, context.names, context.root)),
        line=source_line(node if node.stack_trace else anchor),
        **operands,
    )


def _refuse(reason: Declined, site: AttentionSite) -> bool:
    raise reason


def _fused(node: fx.Node, site: AttentionSite) -> bool:
    """Reads attention that is one operator."""
    fused.read(node, site)
    site.folded = len(site.query.meta["val"].shape) == 3
    return True


def _by_hand(
    node: fx.Node, softmax: Softmax, product: Product, context: Context, site: AttentionSite
) -> bool:
    """Reads attention around a softmax; False if that is over no product of query and key."""
    site.lse = logarithm_of(softmax)
    scores = parse_scores(softmax.operand, context, exact=site.lse is not None)
    if scores is None:
        return False
    _take_scores(scores, site)
    rank = len(softmax.operand.meta["val"].shape)
    if softmax.dim % rank != rank - 1:
        over = f"softmax over dim {softmax.dim} of {rank}, not over the keys"
        raise Declined(over, node)
    sizes = scores.node.meta["val"].shape
    site.folded = len(sizes) == 3
    site.heads = scores.heads or product.heads
    if len(sizes) == 4 and isinstance(sizes[1], int):
        site.heads = sizes[1]
    if site.lse is not None and site.sink_logits is not None:
        raise Declined("logsumexp reads scores that sink logits are joined to", site.lse)
    check_product(product, softmax)
    _check_sink(scores, product, context)
    cleared = [check_guard(guard, site, scores, context) for guard in product.proved_guards]
    site.clears_hidden = True if True in cleared else False if False in cleared else None
    private = [softmax.inner, product.path, *(guard.inner for guard in product.proved_guards)]
    results = [product.node, *([site.lse] if site.lse is not None else [])]
    check_users(scores, [*private, results], results)
    check_token_major(site.key)
    return True


def _take_scores(scores: Scores, site: AttentionSite) -> None:
    """Fills in what stands before the softmax."""
    site.query, site.key, site.form = scores.query, scores.key, f"{scores.form} + softmax"
    site.scale, site.masks, site.factors = scores.scale, scores.masks, scores.factors
    site.mask_scales, site.fills = scores.mask_scales, scores.fills
    site.softcap = scores.softcap
    site.sink_logits = scores.sink.logits if scores.sink is not None else None
    site.key_transposed = True


def _check_sink(scores: Scores, product: Product, context: Context) -> None:
    """Sink logits are cut off the probabilities again, and nothing else is."""
    if scores.sink is None:
        if product.sliced is None:
            return
        cut = "keys are cut off the probabilities; cut keys and values instead"
        raise Declined(cut, product.sliced)
    if product.sliced is None:
        reason = "attention sink logits are joined to the scores (cat) and not cut off again"
        raise Declined(f"{reason} before the values", scores.sink.node)
    ends = (scores.sink.node, scores.sink.logits)
    for node in sorted(scores.sink.inner if all(context.mode(n).gradients for n in ends) else ()):
        if not context.mode(node).gradients:
            raise Declined("part of the sink logits is under torch.no_grad()", node)
    if not cuts_off(product.sliced, scores.sink):
        where = "first" if scores.sink.first else "last"
        reason = f"attention sink logits come {where}, and another part is cut off the"
        raise Declined(f"{reason} probabilities", product.sliced)


def _by_exponentials(node: fx.Node) -> Declined | None:
    """Why exp() between query @ key^T and a product, a softmax in other words, is not read."""
    source = node.args[1 if node.target is aten.pow.Scalar else 0]
    assert isinstance(source, fx.Node)
    logarithm = source.target in LOG_SOFTMAX
    scores = source.args[0] if logarithm else source
    if product_beyond(node) is None or not reaches_product(scores):
        return None
    what = (
        "log_softmax().exp()"
        if logarithm
        else f"a softmax written with {operator_name(node)}() and a sum"
    )
    return Declined(f"{what} is not read: write softmax(x, dim=-1)", node)


def _opaque(node: fx.Node, context: Context) -> Iterator[tuple[AttentionSite, Parse]]:
    """Each attention inside a higher-order operator that stays as it is, and why."""
    name = str(getattr(node.target, "__name__", node.target))
    if "flex_attention" in name:
        instead = "use scaled_dot_product_attention or eager attention"
        why = Declined(f"flex_attention keeps its own block mask: {instead}", node)
        yield _site(node, context, name), functools.partial(_refuse, why)
        return
    form = "torch.vmap or torch.func" if name == "under_transform" else name
    stays = f"attention inside {form}, which stays as it is: call the attention outside of it"
    for held in node.all_input_nodes:
        body = opaque_body(held)
        for inside in attentions_inside(body) if body is not None else ():
            site = _site(node, context, form)
            site.line = source_line(inside)
            if inside.meta.get("nn_module_stack"):
                site.layer = module_path(inside, context.names, context.root)
            yield site, functools.partial(_refuse, Declined(stays, node))
