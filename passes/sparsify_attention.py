"""Writes one MoBA operator for each attention site that the policy makes sparse.

    before  query, key, value -> (dense attention with its mask) -> output [B, Hq, Nq, Dv]
    after   moonfx::moba_attention(query, key, value, block, topk, sinks, scale, key_mask)[0]

A site with a proved padding mask gets key_mask [B, Nk], read from the mask's own leaves; the dense
[B, 1, Nq, Nk] mask is left without users and is removed with the rest of the dead nodes.
"""

import operator
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.capture import Size, expression, fake_values, same_size
from moonfx.passes import layout
from moonfx.passes.atoms import heads_of
from moonfx.passes.context import Context
from moonfx.passes.expressions import is_load, loads
from moonfx.passes.nodes import body_of
from moonfx.passes.symbols import BATCH, KEY
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite, Reject

aten = torch.ops.aten

_RELATIONS = {
    sympy.Eq: aten.eq.Scalar,
    sympy.Ne: aten.ne.Scalar,
    sympy.Lt: aten.lt.Scalar,
    sympy.Le: aten.le.Scalar,
    sympy.Gt: aten.gt.Scalar,
    sympy.Ge: aten.ge.Scalar,
}
_FLIPPED = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}


# key_mask nodes of one graph, by predicate, rows and length.
Masks = dict[tuple[Any, ...], fx.Node]


class CannotWrite(Exception):
    """A padding predicate that has no operator form."""


def run(graph: fx.Graph, context: Context) -> int:
    """Rewrites the supported sites of the graph; returns how many."""
    rewritten = 0
    masks: Masks = {}
    for site in context.sites:
        if site.output.graph is not graph or site.reject is not None:
            continue
        policy = context.policy(site, context.sites, context.root)
        if not isinstance(policy, LayerPolicy):
            site.action = policy
            continue
        site.policy = policy
        context.rest_on_constants(site)
        try:
            rewrite(site, policy, masks, context)
        except (CannotWrite, layout.CannotKeep) as reason:
            context.decline(site, Reject(str(reason), site.output))
            continue
        site.action, rewritten = "sparse", rewritten + 1
    return rewritten


def rewrite(site: AttentionSite, policy: LayerPolicy, masks: Masks, context: Context) -> None:
    """Replaces one site's output by the operator."""
    graph, old = site.output.graph, site.output
    padding = site.mask.padding if site.mask is not None else None
    dtype = old.meta["val"].dtype
    with graph.inserting_before(old), fake_values(context.gm):
        key_mask = _key_mask(site, padding, masks, context) if padding is not None else None
        query, key, value = site.query, site.key, site.value
        if site.key_transposed:
            key = _call(aten.transpose.int, key, -2, -1)
        for factor, how in site.factors:
            query = _call(aten.mul.Tensor if how == "mul" else aten.div.Tensor, query, factor)
        operands = [query, key, value]
        if site.folded:
            operands = [_call(aten.unsqueeze.default, x, 1) for x in operands]
        operands = [
            x if x.meta["val"].dtype == dtype else _call(aten.to.dtype, x, dtype) for x in operands
        ]
        setting: tuple[Any, ...] = (policy.block, policy.topk, policy.sinks, site.scale, key_mask)
        if site.softcap:
            setting += (True, site.softcap)
        both = _call(torch.ops.moonfx.moba_attention.default, *operands, *setting)
        new = _call(operator.getitem, both, 0)
        if site.sink_logits is not None:
            new = _with_sink(new, _call(operator.getitem, both, 1), site.sink_logits)
        if site.folded:
            new = _call(aten.squeeze.dim, new, 1)
        new = layout.keep(old, new, context)
    for node in (both, new):
        node.meta.update(
            {k: old.meta[k] for k in ("stack_trace", "nn_module_stack") if k in old.meta}
        )
    old.replace_all_uses_with(new)
    context.changed(graph)
    site.output = new


def _with_sink(out: fx.Node, lse: fx.Node, logits: fx.Node) -> fx.Node:
    """Attention whose denominator has exp(logits[head]) more: out * sigmoid(lse - logits)."""
    heads = lse.meta["val"].shape[1]
    logits = _call(aten.to.dtype, _call(aten.reshape.default, logits, [1, heads, 1]), torch.float32)
    kept = _call(aten.sigmoid.default, _call(aten.sub.Tensor, lse, logits))
    scaled = _call(aten.mul.Tensor, out, _call(aten.unsqueeze.default, kept, -1))
    return _call(aten.to.dtype, scaled, out.meta["val"].dtype)


def _call(target: Any, *args: Any) -> fx.Node:
    """Inserts a call and computes its fake value."""
    first = next(a for a in args if isinstance(a, fx.Node))
    node = first.graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _key_mask(site: AttentionSite, padding: Any, masks: Masks, context: Context) -> fx.Node:
    """key_mask [B, Nk] of the site, made once per graph.

    In a nested body the leaves lie outside, so the mask is made there and passed in.
    """
    key_dim = -1 if site.key_transposed else -2
    rows, keys = site.key.meta["val"].shape[0], site.key.meta["val"].shape[key_dim]
    once = (padding, expression(rows), expression(keys))
    if once not in masks:
        leaves = [context.reader.leaf(x) for x in loads(padding)]
        home = leaves[0].graph
        if any(leaf.graph is not home for leaf in leaves):
            raise CannotWrite("a padding mask whose parts lie in different graphs")
        path: list[fx.Node] = []
        graph = site.output.graph
        while graph is not home:
            call = context.call_of(graph)
            if call is None:
                raise CannotWrite("a padding mask from a nested body")
            path.append(call)
            graph = call.graph
        size = _Sizes(site, home)
        with home.inserting_before(path[-1] if path else site.output):
            mask = _write(padding, keys, context, size)
            if not same_size(mask.meta["val"].shape[0], rows):
                mask = _call(aten.expand.default, mask, [size.of(rows, 0), size.of(keys, key_dim)])
        for call in reversed(path):
            mask = _pass_in(call, mask)
            context.changed(mask.graph)
        masks[once] = mask
    return masks[once]


class _Sizes:
    """Sizes of the site's keys as node arguments: a number, or a sym_size node."""

    def __init__(self, site: AttentionSite, home: fx.Graph) -> None:
        self.site, self.home = site, home

    def of(self, size: Size, dim: int) -> Any:
        if isinstance(size, int):
            return size
        if self.site.key.graph is not self.home:
            raise CannotWrite("a padding mask of another length, outside a nested body")
        return _call(aten.sym_size.int, self.site.key, dim)

    def keys(self, size: Size) -> Any:
        return self.of(size, -1 if self.site.key_transposed else -2)


def _write(expr: Any, keys: Size, context: Context, size: _Sizes) -> fx.Node:
    """A predicate over (row, key) as operators on the leaves."""
    if isinstance(expr, sympy.And | sympy.Or):
        target = (
            aten.logical_and.default if isinstance(expr, sympy.And) else aten.logical_or.default
        )
        parts = [_write(a, keys, context, size) for a in expr.args]
        result = parts[0]
        for part in parts[1:]:
            result = _call(target, result, part)
        return result
    if isinstance(expr, sympy.Not):
        return _call(aten.logical_not.default, _write(expr.args[0], keys, context, size))
    relation = expr.func
    left, right = expr.args
    if left.is_number:
        left, right, relation = right, left, _FLIPPED.get(relation, relation)
    if not (is_load(left) and right.is_number and relation in _RELATIONS):
        raise CannotWrite(f"padding predicate {expr}")
    leaf = _load(left, keys, context, size)
    if leaf.meta["val"].dtype == torch.bool:
        if right != 0 or relation not in (sympy.Ne, sympy.Eq):
            raise CannotWrite(f"padding predicate {expr}")
        return leaf if relation is sympy.Ne else _call(aten.logical_not.default, leaf)
    number = int(right) if right.is_Integer else float(right)
    return _call(_RELATIONS[relation], leaf, number)


def _load(load: Any, keys: Size, context: Context, size: _Sizes) -> fx.Node:
    """leaf(b, j + c) as [B, Nk], leaf(0, j + c) and leaf(j + c) as [1, Nk]."""
    leaf = context.reader.leaf(load)
    *row, key = load.args
    start = sympy.expand(key - KEY)
    if not row:
        leaf = _call(aten.unsqueeze.default, leaf, 0)
    elif (heads := heads_of(row[0])) is not None:
        leaf = _call(aten.repeat_interleave.self_int, leaf, heads, 0)
    elif row[0] != BATCH:
        leaf = _call(aten.slice.Tensor, leaf, 0, int(row[0]), int(row[0]) + 1)
    if start == 0 and same_size(leaf.meta["val"].shape[1], keys):
        return leaf
    if not start.is_Integer:
        raise CannotWrite(f"a padding mask read from position {start}")
    length = size.keys(keys)
    end = length + int(start) if isinstance(length, int) else length
    if not isinstance(length, int) and start != 0:
        end = _call(operator.add, length, int(start))
    return _call(aten.slice.Tensor, leaf, 1, int(start), end)


def _pass_in(call: fx.Node, value: fx.Node) -> fx.Node:
    """Adds an operand to a nested body and returns its placeholder."""
    body = body_of(call)
    assert body is not None
    call.args = (*call.args, value)
    last = [n for n in body.graph.nodes if n.op == "placeholder"][-1]
    with body.graph.inserting_after(last):
        placeholder = body.graph.placeholder("key_mask")
    placeholder.meta["val"] = value.meta["val"]
    return placeholder
