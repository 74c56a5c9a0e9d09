"""Finds dense softmax attention, however it is written, or says why a look-alike is not it.

    before  softmax(mask(scale(query @ key^T)), dim=-1) @ value, or one scaled_dot_product_attention
    after   the same graph, and an AttentionSite or a Reject for each

Anchors on scaled_dot_product_attention and softmax nodes and parses outwards by the grammar of
`scores.py` and `probabilities.py`. Every constant is read from the node that carries it. A softmax
of no product, or one that enters no product (a router, a loss), is no site and is passed over.
"""

from typing import Any

from torch import fx

from moonfx.capture.graph_nodes import is_higher_order, module_path, opaque_body, source_line
from moonfx.passes.attention import fused_operators as fused
from moonfx.passes.attention.external_users import out_of_place, used_elsewhere
from moonfx.passes.attention.hazards import overwritten, split_by_mode
from moonfx.passes.attention.heads import (
    fold_groups,
    heads_in_batch,
    merge_heads,
    unfold_heads,
    unfold_product,
    untranspose,
)
from moonfx.passes.attention.key_transpose import token_major
from moonfx.passes.attention.nan_guards import unproved
from moonfx.passes.attention.opaque_bodies import attentions_inside
from moonfx.passes.attention.probabilities import Product, product_beyond, product_of
from moonfx.passes.attention.scores import Scores, parse_scores
from moonfx.passes.attention.shapes import aten, check_shapes
from moonfx.passes.attention.sink_logits import cuts_off
from moonfx.passes.attention.softmax import logarithm_of, read_softmax
from moonfx.passes.attention.upstream import constant_of, reaches_product
from moonfx.passes.context import Context
from moonfx.passes.graph.dead_code import remove_dead_code
from moonfx.passes.graph.nodes import operator_name as short
from moonfx.passes.graph.operators import EXP, LOG_SOFTMAX, POWERS, SOFTMAX
from moonfx.site import AttentionSite, Reject


def run(graph: fx.Graph, context: Context) -> int:
    """Appends to context.sites each attention of the graph, declined ones included."""
    found = 0
    remove_dead_code(graph)  # a dead reader of the probabilities is no reader
    for node in list(graph.nodes):
        site: AttentionSite | None = None
        if node.op != "call_function":
            continue
        if fused.is_attention(node):
            site = parse_fused(node, context)
        elif node.target in SOFTMAX | EXP | POWERS:
            site = parse_softmax(node, context)
        elif is_higher_order(node):
            for declined in _opaque(node, context):
                assert declined.reject is not None
                context.sites.append(declined)
                context.decline(declined, declined.reject)
        else:
            continue
        if site is None:
            continue
        context.sites.append(site)
        if site.reject is None:
            site.reject = check_shapes(site) or overwritten(site, context)
        if site.reject is None:
            site.reject = split_by_mode(site, context)
        if site.reject is not None:
            context.decline(site, site.reject)
        else:
            found += 1
    return found


def _site(node: fx.Node, context: Context, form: str, **found: Any) -> AttentionSite:
    anchor = node
    if not node.meta.get("nn_module_stack") and (call := context.call_of(node.graph)) is not None:
        anchor = call
    operands = {"query": node, "key": node, "value": node, "output": node, **found}
    return AttentionSite(
        form=form,
        layer=context.in_this_call(node, module_path(anchor, context.names, context.root)),
        line=source_line(node if node.stack_trace else anchor),
        **operands,
    )


def parse_fused(node: fx.Node, context: Context) -> AttentionSite:
    site = _site(node, context, fused.name_of(node))
    fused.read(node, site)
    if site.reject is None:
        context.changed(node.graph)
        site.folded = len(site.query.meta["val"].shape) == 3
        site.heads = heads_in_batch(site.query) if site.folded else None
        fold_groups(site)
    return site


def parse_softmax(node: fx.Node, context: Context) -> AttentionSite | None:
    softmax = read_softmax(node)
    product = None if softmax is None else product_of(softmax, context)
    if softmax is None or product is None:
        return _by_exponentials(node, context) if node.target in EXP | POWERS else None
    site = _site(node, context, "softmax", output=product.node, value=product.value)
    site.lse = logarithm_of(softmax)
    scores = parse_scores(softmax.operand, context, exact=site.lse is not None)
    if scores is None:
        return None
    if isinstance(scores, Reject):
        site.reject = scores
        return site
    site.query, site.key, site.form = scores.query, scores.key, f"{scores.form} + softmax"
    site.scale, site.masks, site.factors = scores.scale, scores.masks, scores.factors
    site.mask_scales = scores.mask_scales
    site.softcap = scores.softcap
    site.sink_logits = scores.sink.logits if scores.sink is not None else None
    site.key_transposed = True
    rank = len(softmax.operand.meta["val"].shape)
    if softmax.dim % rank != rank - 1:
        over = f"softmax over dim {softmax.dim} of {rank}, not over the keys"
        site.reject = Reject(over, node)
        return site
    sizes = scores.node.meta["val"].shape
    site.folded = len(sizes) == 3
    site.heads = scores.heads or product.heads
    if len(sizes) == 4 and isinstance(sizes[1], int):
        site.heads = sizes[1]
    site.reject = product.reject or _sink_agrees(scores, product, context)
    if site.lse is not None and site.sink_logits is not None:
        site.reject = Reject("logsumexp reads scores that sink logits are joined to", site.lse)
    for guard in product.guards:
        site.reject = site.reject or unproved(guard, site, scores, context)
    private = [softmax.inner, product.path, *(guard.inner for guard in product.guards)]
    results = [product.node, *([site.lse] if site.lse is not None else [])]
    site.reject = site.reject or used_elsewhere(scores, [*private, results], results)
    site.reject = site.reject or token_major(site.key)
    if site.reject is None:
        out_of_place(scores, context)
        if site.folded and site.heads is None:
            site.heads = heads_in_batch(site.query)
        if site.folded and len(site.value.meta["val"].shape) == 4:
            site.masks = [m for m in site.masks if constant_of(m[0], context) != 0]
            site.reject = unfold_product(site)
        untranspose(site)
        site.reject = site.reject or merge_heads(site)
        if site.folded and site.sink_logits is not None:
            site.reject = unfold_heads(site)
        fold_groups(site)
        context.changed(node.graph)
    return site


def _sink_agrees(scores: Scores, product: Product, context: Context) -> Reject | None:
    """Sink logits are cut off the probabilities again, and nothing else is."""
    if scores.sink is None:
        if product.sliced is None:
            return None
        cut = "keys are cut off the probabilities; cut keys and values instead"
        return Reject(cut, product.sliced)
    if product.sliced is None:
        reason = "attention sink logits are joined to the scores (cat) and not cut off again"
        return Reject(f"{reason} before the values", scores.sink.node)
    ends = (scores.sink.node, scores.sink.logits)
    for node in sorted(scores.sink.inner if all(context.mode(n).gradients for n in ends) else ()):
        if not context.mode(node).gradients:
            return Reject("part of the sink logits is under torch.no_grad()", node)
    if not cuts_off(product.sliced, scores.sink):
        where = "first" if scores.sink.first else "last"
        reason = f"attention sink logits come {where}, and another part is cut off the"
        return Reject(f"{reason} probabilities", product.sliced)
    return None


def _by_exponentials(node: fx.Node, context: Context) -> AttentionSite | None:
    """A declined site for exp() between query @ key^T and a product: a softmax in other words."""
    source = node.args[1 if node.target is aten.pow.Scalar else 0]
    assert isinstance(source, fx.Node)
    logarithm = source.target in LOG_SOFTMAX
    scores = source.args[0] if logarithm else source
    if product_beyond(node) is None or not reaches_product(scores):
        return None
    name = short(node)
    what = "log_softmax().exp()" if logarithm else f"a softmax written with {name}() and a sum"
    site = _site(node, context, "exp")
    site.reject = Reject(f"{what} is not read: write softmax(x, dim=-1)", node)
    return site


def _opaque(node: fx.Node, context: Context) -> list[AttentionSite]:
    """A declined site for each attention inside a higher-order operator that stays as it is."""
    name = str(getattr(node.target, "__name__", node.target))
    if "flex_attention" in name:
        site = _site(node, context, name)
        instead = "use scaled_dot_product_attention or eager attention"
        site.reject = Reject(f"flex_attention keeps its own block mask: {instead}", node)
        return [site]
    form = "torch.vmap or torch.func" if name == "under_transform" else name
    sites = []
    for held in node.all_input_nodes:
        body = opaque_body(held)
        for inside in attentions_inside(body) if body is not None else ():
            site = _site(node, context, form)
            site.line = source_line(inside)
            if inside.meta.get("nn_module_stack"):
                site.layer = module_path(inside, context.names, context.root)
            site.reject = Reject(
                f"attention inside {form}, which stays as it is: call the attention outside of it",
                node,
            )
            sites.append(site)
    return sites
