"""Attention that is one operator: scaled_dot_product_attention, and those that others register.

    before  scaled_dot_product_attention(q, k, v, mask, scale=0.1)       any shape, any keyword
    after   an AttentionSite

An operator is read by the names in its own schema. One that takes what the rewrite does not know,
or is not in the table but by its name is attention, is declined by name, so that none goes unseen.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moonfx.site import AttentionSite, Declined

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """How a family of operators is read.

    Args:
        tokens_first: operands and result are [B, N, H, D].
        several: the operator returns (output, ...).
        harmless: arguments of any value that leave the output as it is.
    """

    tokens_first: bool = False
    several: bool = True
    harmless: frozenset[str] = frozenset()


_BOOKKEEPING = frozenset(
    {"compute_log_sumexp", "return_debug_mask", "return_softmax", "enable_gqa", "deterministic"}
)
_ATEN = Kind(harmless=_BOOKKEEPING)
_FLASH = Kind(tokens_first=True, harmless=_BOOKKEEPING)

KINDS: dict[str, Kind] = {
    "aten::scaled_dot_product_attention": Kind(several=False, harmless=_BOOKKEEPING),
    "aten::_scaled_dot_product_flash_attention": _ATEN,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _ATEN,
    "aten::_scaled_dot_product_efficient_attention": _ATEN,
    "aten::_scaled_dot_product_cudnn_attention": _ATEN,
    "aten::_scaled_dot_product_fused_attention_overrideable": _ATEN,
    "aten::_scaled_dot_product_attention_math": _ATEN,
    "flash_attn::_flash_attn_forward": _FLASH,
}

# Whole layers in one operator, in inference.
_FAST_PATHS = ("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd")

# name in a schema -> what it is
_ROLES = {
    "query": "query",
    "q": "query",
    "key": "key",
    "k": "key",
    "value": "value",
    "v": "value",
    "attn_mask": "mask",
    "attn_bias": "mask",
    "dropout_p": "dropout",
    "is_causal": "causal",
    "causal": "causal",
    "scale": "scale",
    "softmax_scale": "scale",
    "softcap": "softcap",
}
# name -> the value that asks for nothing
_NEUTRAL: dict[str, Any] = {
    "window_size_left": -1,
    "window_size_right": -1,
    "alibi_slopes": None,
    "dropout_mask": None,
}


def is_attention(node: fx.Node) -> bool:
    """Whether the operator, going by its name and its operands, is attention."""
    schema = getattr(node.target, "_schema", None)
    name = str(getattr(schema, "name", "")).lower()
    if schema is None or name.startswith("moonfx::") or "backward" in name:
        return False
    if name in KINDS:
        return True
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    wide = [n for n in tensors if n.meta["val"].dim() >= 3 and n.meta["val"].is_floating_point()]
    if name in _FAST_PATHS:
        return True
    return ("attention" in name or "attn" in name or "fmha" in name) and len(wide) >= 3


def name_of(node: fx.Node) -> str:
    """What a report calls the operator."""
    if node.target is aten.scaled_dot_product_attention.default:
        return "sdpa"
    return str(node.target._schema.name).split("::")[-1].strip("_")  # type: ignore[union-attr]


def read(node: fx.Node, site: AttentionSite) -> None:
    """Fills in a site from the operator's arguments.

    Raises:
        Declined: if one of them is in the way.
    """
    name = node.target._schema.name  # type: ignore[union-attr]
    kind = KINDS.get(name)
    if kind is None:
        instead = "torch.backends.mha.set_fastpath_enabled(False) takes the path that is"
        if name not in _FAST_PATHS:
            instead = "use scaled_dot_product_attention"
        raise Declined(f"the operator {name} is not read: {instead}", node)
    given = _arguments(node, kind)
    site.query, site.key, site.value = given["query"], given["key"], given["value"]
    site.causal = bool(given.get("causal", False))
    mask, dropout, scale = given.get("mask"), given.get("dropout", 0.0), given.get("scale")
    if dropout != 0.0:
        reason = f"dropout p={dropout} is active; set it to 0 or call eval()"
        raise Declined(reason, node, of_call=True)
    if mask is not None:
        how = "keep" if mask.meta["val"].dtype == torch.bool else "additive"
        site.masks.append((mask, how))
    site.softcap = given.get("softcap", 0.0)
    if isinstance(scale, fx.Node):
        site.scale, site.factors = 1.0, [(scale, "mul")]
    elif scale is not None and not 0 < scale < float("inf"):
        raise Declined(f"the scores are scaled by {scale}; a scale must be above 0", node)
    else:
        site.scale = scale
    if site.softcap and isinstance(scale, fx.Node):
        raise Declined("a softcap and a scale that is no constant; give a float", node)
    if kind.several:
        site.output, site.tokens_first = _only_output(node), kind.tokens_first


def _arguments(node: fx.Node, kind: Kind) -> dict[str, Any]:
    """The operator's arguments by their role; the others must ask for nothing."""
    name = node.target._schema.name  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        value = node.kwargs.get(argument.name, default)
        if position < len(node.args) and not argument.kwarg_only:
            value = node.args[position]
        role = _ROLES.get(argument.name)
        if role is not None:
            given[role] = value
        elif argument.name in _NEUTRAL:
            if value != _NEUTRAL[argument.name]:
                neutral = f"{argument.name}={_NEUTRAL[argument.name]}"
                has = f"{name} with {argument.name}={value}; only {neutral} is read"
                raise Declined(has, node)
        elif argument.name not in kind.harmless:
            raise Declined(f"{name} has an argument that is not read: {argument.name}", node)
    return given


def first_results(node: fx.Node) -> list[fx.Node]:
    """What takes the first of several results, and is read itself."""
    taken = [u for u in node.users if u.users and u.target is operator.getitem and u.args[1] == 0]
    return sorted(taken)


def _only_output(node: fx.Node) -> fx.Node:
    """The first of several results; no other may have a user."""
    used = [u for u in node.users if u.users]
    if any(u.target is not operator.getitem for u in used):
        raise Declined("what the operator returns is not taken apart", node)
    beyond = [u for u in used if u.args[1] != 0]
    if beyond or not used:
        which = ", ".join(u.name for u in beyond)
        more = f"more than the output of the operator is used: {which}; leave out the logsumexp"
        raise Declined(more, node)
    if len(used) > 1:  # which `canonicalize` joins
        raise Declined("the output of the operator is taken twice; take it once", node)
    return used[0]
