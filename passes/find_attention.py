"""Finds dense softmax attention, however it is written, or says why a look-alike is not it.

    before  softmax(mask(scale(query @ key^T)), dim=-1) @ value, or one scaled_dot_product_attention
    after   the same graph, and an AttentionSite or a Reject for each

Anchors on scaled_dot_product_attention and softmax nodes and parses outwards by one grammar:

    (matmul | bmm | baddbmm | einsum)(query, key^T)
        -> {mul | div by a constant, add mask, where, masked_fill}*
        -> softmax over the key dim -> {cast, inactive dropout}* -> (matmul | bmm | einsum)(., value)

Every constant is read from the node that carries it. A softmax whose result is not the left operand
of a product (a router, a loss) is not a site and is passed over.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moonfx.capture import hint, is_captured, is_higher_order, module_path, same_size, source_line
from moonfx.passes.context import Context
from moonfx.passes.index_algebra import argument, permutation
from moonfx.site import AttentionSite, Reject

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.special_softmax.default,
}
MATMUL = {aten.matmul.default, aten.bmm.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
DROPOUT = {aten.dropout.default, aten.native_dropout.default}
ADD = {aten.add.Tensor}
MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
MASKED_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def run(graph: fx.Graph, context: Context) -> int:
    """Appends to context.sites each attention of the graph, declined ones included."""
    found = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is SDPA:
            site = parse_sdpa(node, context)
        elif node.target in SOFTMAX:
            site = parse_softmax(node, context)
        elif is_higher_order(node):
            site = _opaque(node, context)
        else:
            continue
        if site is None:
            continue
        context.sites.append(site)
        if site.reject is None and (reason := check_shapes(site)) is not None:
            site.reject = reason
        if site.reject is None and (reason := _overwritten(site, context)) is not None:
            site.reject = reason
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
        layer=module_path(anchor, context.names),
        line=source_line(node if node.stack_trace else anchor),
        **operands,
    )


# --- scaled_dot_product_attention ------------------------------------------------------------------


def parse_sdpa(node: fx.Node, context: Context) -> AttentionSite:
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    scale = node.kwargs.get("scale")
    key, value = fold_groups(key, value)
    site = _site(
        node,
        context,
        "sdpa",
        query=query,
        key=key,
        value=value,
        causal=bool(argument(node, 5, "is_causal", False)),
    )
    dropout = argument(node, 4, "dropout_p", 0.0)
    if dropout != 0.0:
        site.reject = Reject(f"dropout p={dropout} is active; set it to 0 or call eval()", node)
    elif mask is not None:
        kind = "keep" if mask.meta["val"].dtype == torch.bool else "additive"
        site.masks.append((mask, kind))
    if isinstance(scale, fx.Node):
        site.scale, site.factors = 1.0, [(scale, "mul")]
    else:
        site.scale = scale
    return site


# --- softmax(scores) @ value -----------------------------------------------------------------------


def parse_softmax(node: fx.Node, context: Context) -> AttentionSite | None:
    product = _product_of_probabilities(node)
    if product is None:
        return None
    output, probabilities, value, uses = product
    site = _site(node, context, "softmax", output=output, value=value)
    chain = parse_scores(node.args[0], context)
    if chain is None:
        return None
    if isinstance(chain, Reject):
        site.reject = chain
        return site
    scores, site.scale, site.masks, site.factors = chain
    site.query, site.key, site.form = scores.query, scores.key, f"{scores.form} + softmax"
    site.key_transposed = True
    rank = len(node.meta["val"].shape)
    dim = argument(node, 1, "dim")
    if dim % rank != rank - 1:
        site.reject = Reject(f"softmax over dim {dim} of {rank}, not over the keys", node)
    elif isinstance(uses, Reject):
        site.reject = uses
    elif (key := _token_major(site.key)) is not None:
        site.reject = key
    elif (shared := _used_elsewhere(node, scores.node)) is not None:
        site.reject = shared
    else:
        site.folded = rank == 3
        _fold_transposed(site)
    return site


def _product_of_probabilities(
    softmax: fx.Node,
) -> tuple[fx.Node, fx.Node, fx.Node, Reject | None] | None:
    """(product, probabilities, value, why not) of the matmul that the probabilities enter."""
    node, reject = softmax, None
    while True:
        products = [u for u in node.users if _left_operand(u) is node]
        if products:
            product = products[0]
            others = [u for u in node.users if u is not product]
            if others and reject is None:
                names = ", ".join(u.name for u in others)
                reject = Reject(f"the probabilities are also used by {names}", node)
            value = _right_operand(product)
            assert value is not None
            return product, node, value, reject
        step = [u for u in node.users if u.target in CASTS | COPIES | DROPOUT]
        if not step:
            return None
        if len(node.users) > 1 and reject is None:
            names = ", ".join(u.name for u in node.users if u is not step[0])
            reject = Reject(f"the probabilities are also used by {names}", node)
        node = step[0]
        if node.target in DROPOUT:
            p, train = argument(node, 1, "p"), argument(node, 2, "train")
            if train and p != 0.0 and reject is None:
                reject = Reject(f"dropout p={p} is active; set it to 0 or call eval()", node)


def _einsum(node: fx.Node) -> tuple[str, str, str] | None:
    """(left, right, result) subscripts of a two-operand einsum."""
    if node.target is not aten.einsum.default:
        return None
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2 or "." in equation:
        return None
    inputs, arrow, result = equation.partition("->")
    left, _, right = inputs.partition(",")
    return (left, right, result) if arrow else None


def _left_operand(node: fx.Node) -> fx.Node | None:
    """The probabilities operand of a product with the values."""
    if node.target in MATMUL:
        return node.args[0]  # type: ignore[return-value]
    if (parts := _einsum(node)) is not None:
        left, right, result = parts
        # probabilities [batch, i, j], values [batch, j, d], result [batch, i, d]
        plain = len(left) >= 3 and left[:-2] == right[:-2] == result[:-2]
        if plain and left[-1] == right[-2] and result[-2:] == left[-2] + right[-1]:
            return node.args[1][0]  # type: ignore[index,return-value]
    return None


def _right_operand(node: fx.Node) -> fx.Node | None:
    if node.target in MATMUL:
        return node.args[1]  # type: ignore[return-value]
    return node.args[1][1]  # type: ignore[index,return-value]


class Scores:
    """query @ key^T: the node, its operands, and which operator made it."""

    def __init__(self, node: fx.Node, query: fx.Node, key: fx.Node, form: str) -> None:
        self.node, self.query, self.key, self.form = node, query, key, form


Masks = list[tuple[fx.Node, str]]
Factors = list[tuple[fx.Node, str]]
Chain = tuple[Scores, float, Masks, Factors]


def parse_scores(node: Any, context: Context) -> Chain | Reject | None:
    """Walks from the softmax back to query @ key^T; None if no such product is there at all."""
    scale = 1.0
    masks: Masks = []
    factors: Factors = []
    start = node
    while isinstance(node, fx.Node):
        target = node.target
        if target in MATMUL:
            query, key = node.args[:2]
            return Scores(node, query, key, node.target.__name__.split(".")[0]), scale, masks, factors  # type: ignore
        if target is aten.baddbmm.default:
            return _baddbmm(node, scale, masks, factors)
        if target is aten.einsum.default:
            return _einsum_scores(node, scale, masks, factors)
        if target in CASTS | COPIES:
            if target in CASTS and not node.meta["val"].dtype.is_floating_point:
                return Reject("the scores are cast to integers", node)
            node = node.args[0]
        elif target in MULTIPLY | DIVIDE:
            source, given = node.args[:2]
            if target in MULTIPLY and not reaches_product(source):
                source, given = given, source
            factor = _constant(given, context)
            if factor is None:
                if not _is_scalar(given):
                    return _reject_if_scores(node, start, "the scores are scaled by a tensor")
                factors.append((given, "mul" if target in MULTIPLY else "div"))
                node = source
                continue
            if not factor > 0:
                return _reject_if_scores(node, start, f"the scores are scaled by {factor}")
            scale = scale * factor if target in MULTIPLY else scale / factor
            node = source
        elif target in ADD:
            if node.kwargs.get("alpha", 1) != 1:
                return _reject_if_scores(node, start, "the mask is added with alpha != 1")
            left, right = node.args[:2]
            from_scores = [s for s in (left, right) if reaches_product(s)]
            if len(from_scores) != 1:
                if not from_scores:
                    return None
                return Reject("two products are added before the softmax", node)
            other = right if from_scores[0] is left else left
            if not isinstance(other, fx.Node):
                node = from_scores[0]  # softmax(x + constant) == softmax(x)
                continue
            masks.append((other, "additive"))
            node = from_scores[0]
        elif target in WHERE:
            condition, yes, no = node.args
            if reaches_product(yes) and _hides(no, context):
                masks.append((condition, "keep"))
                node = yes
            elif reaches_product(no) and _hides(yes, context):
                masks.append((condition, "drop"))
                node = no
            else:
                return _reject_if_scores(node, start, "where() fills in a value that is no mask")
        elif target in MASKED_FILL:
            if not _hides(node.args[2], context):
                return _reject_if_scores(node, start, "masked_fill() with a value that is no mask")
            masks.append((node.args[1], "drop"))
            node = node.args[0]
        else:
            reason = f"'{_short(node)}' stands between query @ key^T and the softmax"
            return _reject_if_scores(node, start, reason)
    return None


def _is_scalar(value: object) -> bool:
    """A tensor or a symbolic number that holds one value for all heads and positions."""
    if not isinstance(value, fx.Node):
        return False
    held = value.meta.get("val")
    return held.dim() == 0 if isinstance(held, torch.Tensor) else held is not None


def _baddbmm(node: fx.Node, scale: float, masks: Masks, factors: Factors) -> Chain | Reject:
    added, query, key = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float) or not alpha > 0:
        return Reject(f"the scores are scaled by {alpha}", node)
    if beta != 0:
        if beta != 1:
            return Reject(f"the mask is added with beta={beta}", node)
        masks = [*masks, (added, "additive")]
    return Scores(node, query, key, "baddbmm"), scale * alpha, masks, factors  # type: ignore[arg-type]


def _einsum_scores(
    node: fx.Node, scale: float, masks: Masks, factors: Factors
) -> Chain | Reject | None:
    """query [batch, i, d], key [batch, j, d] or key^T [batch, d, j], result [batch, i, j]."""
    parts = _einsum(node)
    if parts is None:
        return Reject(f"einsum '{node.args[0]}' is not read", node)
    left, right, result = parts
    plain = len(left) >= 3 and left[:-2] == right[:-2] == result[:-2]
    if not plain or result[-2] != left[-2] or left[-1] not in right[-2:]:
        return Reject(f"einsum '{node.args[0]}' is not query @ key^T in [.., N, D] layout", node)
    query, key = node.args[1]  # type: ignore[misc]
    if right[-2:] != result[-1] + left[-1]:
        return Reject(f"einsum '{node.args[0]}' is not query @ key^T in [.., N, D] layout", node)
    with node.graph.inserting_before(node):
        transposed = node.graph.call_function(aten.transpose.int, (key, -2, -1))
    transposed.meta["val"] = key.meta["val"].transpose(-2, -1)  # type: ignore[union-attr]
    return Scores(node, query, transposed, "einsum"), scale, masks, factors  # type: ignore[arg-type]


def _constant(value: object, context: Context) -> float | None:
    """A scalar that the graph itself fixes, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        if isinstance(held, torch.Tensor) and held.numel() != 1:
            return None
        rank = len(held.shape) if isinstance(held, torch.Tensor) else 0
        found = context.reader.read(value, (0,) * rank)
        return float(found) if getattr(found, "is_number", False) else None
    return None


def _hides(value: object, context: Context) -> bool:
    """Whether a fill value makes a score vanish."""
    from moonfx.passes.index_algebra import MASKED_BELOW

    found = _constant(value, context)
    return found is not None and found <= MASKED_BELOW


def reaches_product(node: object) -> bool:
    """Whether a node is query @ key^T behind elementwise operators, seen from the softmax."""
    seen: set[fx.Node] = set()
    stack = [node]
    through = CASTS | COPIES | MULTIPLY | DIVIDE | ADD | WHERE | MASKED_FILL
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in MATMUL | {aten.baddbmm.default, aten.einsum.default}:
            return len(node.meta["val"].shape) >= 3
        if node.target in through or node.target in {aten.tanh.default, aten.sub.Tensor}:
            stack.extend(node.args)
    return False


def _reject_if_scores(node: fx.Node, start: Any, reason: str) -> Reject | None:
    """A Reject if the softmax is over a product of tensors at all, else None: no attention."""
    upstream, seen = [start], set()
    while upstream:
        current = upstream.pop()
        if not isinstance(current, fx.Node) or current in seen or len(seen) > 64:
            continue
        seen.add(current)
        if current.target in MATMUL | {aten.baddbmm.default, aten.einsum.default}:
            return Reject(reason, node)
        upstream.extend(current.all_input_nodes)
    return None


def _short(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")


def _used_elsewhere(softmax: fx.Node, scores: fx.Node) -> Reject | None:
    """Scores or anything between them and the softmax that has a second user."""
    node = softmax.args[0]
    while isinstance(node, fx.Node):
        if len(node.users) > 1:
            names = ", ".join(u.name for u in node.users)
            return Reject(f"the scores are used more than once, by {names}", node)
        if node is scores:
            return None
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        node = next((a for a in inputs if a is scores or reaches_product(a)), None)
    return None


def _token_major(key: fx.Node) -> Reject | None:
    """Checks that key^T was made from keys [.., N, D], features last.

    The composed permutation of key^T must put a source dim before the feature dim last; without a
    transpose the product could be query @ weights of the same shape by coincidence of sizes.
    """
    rank = len(key.meta["val"].shape)
    order, node = list(range(rank)), key
    while True:
        step = permutation(node)
        if step is not None:
            order = [step[d] for d in order]
        elif node.target not in CASTS | COPIES | MULTIPLY | DIVIDE:
            break
        node = node.args[0]  # type: ignore[assignment]
        if len(node.meta["val"].shape) != rank:
            return Reject("the scale of the keys changes their rank", key)
    if order[-1] < order[-2]:
        return None
    return Reject("the keys are not transposed: their last dim is not proved to be tokens", key)


# --- grouped-query attention -----------------------------------------------------------------------


def fold_groups(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Key and value before repeat_kv, if both were repeated by the same group size."""
    inner_key, inner_value = grouped_source(key), grouped_source(value)
    if inner_key is None or inner_value is None:
        return key, value
    if same_size(inner_key.meta["val"].shape[1], inner_value.meta["val"].shape[1]):
        return inner_key, inner_value
    return key, value


def whole(node: Any) -> Any:
    """The node behind copies and slices that take everything, as x[:, :, None] leaves them."""
    while isinstance(node, fx.Node) and (node.target in COPIES or _takes_everything(node)):
        node = node.args[0]
    return node


def _takes_everything(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)


def grouped_source(node: fx.Node) -> fx.Node | None:
    """k [B, Hkv, N, D] of unsqueeze -> expand [B, Hkv, G, N, D] -> reshape, or repeat_interleave."""
    node = whole(node)
    if node.target is aten.repeat_interleave.self_int:
        source, _, *rest = node.args
        dim = rest[0] if rest else node.kwargs.get("dim")
        return source if dim in (1, -3) else None  # type: ignore[return-value]
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    expanded = whole(node.args[0])
    if not (isinstance(expanded, fx.Node) and expanded.target is aten.expand.default):
        return None
    inserted = whole(expanded.args[0])
    if not isinstance(inserted, fx.Node) or inserted.target is not aten.unsqueeze.default:
        return None
    wide, narrow, out = (n.meta["val"].shape for n in (expanded, inserted, node))
    if len(wide) != 5 or len(narrow) != 5 or len(out) != 4 or inserted.args[1] not in (2, -3):
        return None
    kept = all(same_size(wide[d], narrow[d]) for d in (0, 1, 3, 4))
    if not kept or not same_size(out[1], wide[1] * wide[2]):
        return None
    if not all(same_size(out[d], wide[w]) for d, w in ((0, 0), (2, 3), (3, 4))):
        return None
    return whole(inserted.args[0])  # type: ignore[no-any-return]


def _fold_transposed(site: AttentionSite) -> None:
    """Takes key^T = transpose(key) apart, so that repeat_kv is seen and nothing is transposed."""
    step = permutation(site.key)
    rank = len(site.key.meta["val"].shape)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    if step == swap:
        site.key, site.key_transposed = site.key.args[0], False  # type: ignore[assignment]
        if rank == 4:
            site.key, site.value = fold_groups(site.key, site.value)


# --- shapes ----------------------------------------------------------------------------------------


def check_shapes(site: AttentionSite) -> Reject | None:
    """Fills in heads, lengths and head_dim; a Reject if the operator does not take the shapes."""
    query, key, value = (n.meta["val"] for n in (site.query, site.key, site.value))
    rank = 3 if site.folded else 4
    for name, node in (("query", site.query), ("key", site.key), ("value", site.value)):
        if len(node.meta["val"].shape) != rank:
            return Reject(f"{name} has {len(node.meta['val'].shape)} dimensions, not {rank}", node)
    key_shape = list(key.shape)
    if site.key_transposed:
        key_shape[-1], key_shape[-2] = key_shape[-2], key_shape[-1]
    heads = 1 if site.folded else query.shape[1]
    kv_heads = 1 if site.folded else key_shape[1]
    site.heads, site.kv_heads, site.head_dim = hint(heads), hint(kv_heads), hint(query.shape[-1])
    site.query_length, site.key_length = hint(query.shape[-2]), hint(key_shape[-2])
    for name, other in (("key", key_shape), ("value", value.shape)):
        if not same_size(other[0], query.shape[0]):
            return Reject(f"{name} is broadcast over the batch", site.output)
    if not same_size(key_shape[-1], query.shape[-1]):
        return Reject("query and key differ in head_dim", site.output)
    if not site.folded and not same_size(value.shape[1], key_shape[1]):
        return Reject("key and value differ in heads", site.output)
    if not same_size(value.shape[-2], key_shape[-2]):
        return Reject("key and value differ in length", site.output)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return Reject("the number of heads is not a constant of the graph", site.output)
    if heads % kv_heads:
        return Reject(f"{heads} query heads are no multiple of {kv_heads} key heads", site.output)
    dtype = site.output.meta["val"].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Reject(f"dtype {dtype} is not float32, bfloat16 or float16", site.output)
    return None


def _overwritten(site: AttentionSite, context: Context) -> Reject | None:
    """Query, key or value written to in place after the product that read them."""
    writes = context.writes(site.output.graph)
    position: Callable[[fx.Node], int] = list(site.output.graph.nodes).index
    for name, node in (("query", site.query), ("key", site.key), ("value", site.value)):
        if node in writes and writes[node] > position(node):
            first_use = min(position(u) for u in node.users)
            if writes[node] > first_use:
                return Reject(f"{name} is written to in place after it was read", node)
    return None


# --- bodies that the passes do not look into --------------------------------------------------------


def _opaque(node: fx.Node, context: Context) -> AttentionSite | None:
    """A declined site for attention inside a higher-order operator that stays as it is."""
    name = str(getattr(node.target, "_name", node.target))
    if "flex_attention" in name:
        site = _site(node, context, name)
        site.reject = Reject("flex_attention keeps its own block mask", node)
        return site
    for argument_node in node.all_input_nodes:
        body = getattr(node.graph.owning_module, str(argument_node.target), None)
        if argument_node.op != "get_attr" or not isinstance(body, fx.GraphModule):
            continue
        if not is_captured(body) and any("scaled_dot_product" in str(n.target) for n in body.graph.nodes):
            site = _site(node, context, name)
            site.reject = Reject(f"attention inside the higher-order operator {name}", node)
            return site
    return None
