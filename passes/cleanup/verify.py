"""Checks after a pass that the graph still has the captured form, and that what was written holds.

The captured form, pre-dispatch ATen, which all passes read and keep:

    kinds       a node is a placeholder, get_attr, call_function, call_method or output
    overloads   an operator is one overload of it: aten.add.Tensor, never aten.add
    values      what an operator reads, or gives if anything, has its fake value in meta["val"]
    constants   no tensor that a get_attr reads is fake
    bodies      a body is called with as many operands as it has placeholders

Graph.lint says whether it is well formed besides. A call_method, or a function that is no operator,
is what was left as it was written: nothing is known of it (graph/aliases.py). "nn_module_stack" and
"stack_trace" may be missing.

What moonfx::moba_attention is given:

    operands    query, key and value are [B, H, N, D]
    dtypes      query, key and value have one dtype
    policy      block and topk are at least 1, sinks at least 0
    key_mask    bool [B, Nk]
    key_bias    float32 [B, Hq, Nk], B and Hq possibly 1
    segments    integers [B, Nk]

And of an attention that is sparse:

    output      what replaced it is used, and is [B, H, N, D], or [B * H, N, D]

Fake values, from which compilers take shapes and strides, are those that the operators compute.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value, is_higher_order, placeholders
from moonfx.capture.sizes import fake_values
from moonfx.passes.attention.output_strides import rerun, same_layout
from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import writes
from moonfx.passes.graph.nodes import arguments_of, body_of, operands_of
from moonfx.site import AttentionSite

OPERATOR = torch.ops.moonfx.moba_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default

_KINDS = ("placeholder", "get_attr", "call_function", "call_method", "output")


class InvalidGraph(Exception):
    """A pass broke the graph; a bug of moonfx, never of the user."""


class Invariant(NamedTuple):
    """One thing that must hold.

    Args:
        name: as the module's text has it.
        broken: how it does not hold, None if it does.
    """

    name: str
    broken: Callable[[Any], str | None]


# --- the captured form ----------------------------------------------------------------------------


def _kind(node: fx.Node) -> str | None:
    return None if node.op in _KINDS else f"a {node.op}, which no pass reads"


def _overload(node: fx.Node) -> str | None:
    packet = node.op == "call_function" and hasattr(node.target, "overloads")
    return f"{node.target} is no overload" if packet else None


def _value(node: fx.Node) -> str | None:
    if not hasattr(node.target, "_schema"):
        return None
    results = [node] if node.target._schema.returns else []
    lacks = [n.name for n in (*results, *node.all_input_nodes) if "val" not in n.meta]
    return f"{', '.join(lacks)} without a fake value" if lacks else None


def _constant(node: fx.Node) -> str | None:
    held = buffer_value(node) if node.op == "get_attr" else None
    return f"{node.target} is a fake tensor" if hasattr(held, "fake_mode") else None


def _body(node: fx.Node) -> str | None:
    body = body_of(node) if node.op == "call_function" else None
    if body is None:
        return None
    given = len(operands_of(node))
    taken = len(placeholders(body.graph))
    return None if given == taken else f"{given} operands for a body of {taken} placeholders"


FORM = (
    Invariant("kinds", _kind),
    Invariant("overloads", _overload),
    Invariant("values", _value),
    Invariant("constants", _constant),
    Invariant("bodies", _body),
)


# --- what moonfx::moba_attention is given, by the names of its schema -----------------------------

Arguments = dict[str, Any]


def given_to(node: fx.Node) -> Arguments:
    """An operator's arguments by name: numbers as they are, tensors as their fake values."""
    found = arguments_of(node)
    return {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in found.items()}


def _operands(given: Arguments) -> str | None:
    ranks = {given[name].dim() for name in ("query", "key", "value")}
    return None if ranks == {4} else "operands are not [B, H, N, D]"


def _dtypes(given: Arguments) -> str | None:
    dtypes = {given[name].dtype for name in ("query", "key", "value")}
    return None if len(dtypes) == 1 else "operands differ in dtype"


def _policy(given: Arguments) -> str | None:
    block, topk, sinks = (given[name] for name in ("block", "topk", "sinks"))
    return None if block >= 1 and topk >= 1 and sinks >= 0 else f"no policy: {block}/{topk}/{sinks}"


def _key_mask(given: Arguments) -> str | None:
    mask = given["key_mask"]
    if mask is None or (mask.dtype == torch.bool and mask.dim() == 2):
        return None
    return "key_mask is not bool" if mask.dim() == 2 else "key_mask is not [B, Nk]"


def _key_bias(given: Arguments) -> str | None:
    bias = given["key_bias"]
    if bias is None or (bias.dtype == torch.float32 and bias.dim() == 3):
        return None
    return "key_bias is not float32 [B, Hq, Nk]"


def _segments(given: Arguments) -> str | None:
    segments = given["segments"]
    if segments is None or (_is_integer(segments.dtype) and segments.dim() == 2):
        return None
    return "segments are not integers [B, Nk]"


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


OPERANDS = (
    Invariant("operands", _operands),
    Invariant("dtypes", _dtypes),
    Invariant("policy", _policy),
    Invariant("key_mask", _key_mask),
    Invariant("key_bias", _key_bias),
    Invariant("segments", _segments),
)


# --- attentions that are sparse -------------------------------------------------------------------


def _output(site: AttentionSite) -> str | None:
    used = bool(site.output.users) and site.output.meta["val"].dim() in (3, 4)
    return None if used else "the rewritten output is not used"


SPARSE = (Invariant("output", _output),)


def run(graph: fx.Graph, context: Context) -> int:
    """Returns 0.

    Raises:
        InvalidGraph: naming the node, and what does not hold of it.
    """
    graph.lint()
    for node in graph.nodes:
        _check(FORM, node, node.name)
        if node.target is OPERATOR:
            _check(OPERANDS, given_to(node), node.name)
    for site in context.sites:
        if site.action == "sparse" and site.output.graph is graph:
            _check(SPARSE, site, site.layer)
    _check_fake_values(graph, context)
    return 0


def _check(rows: tuple[Invariant, ...], what: Any, name: str) -> None:
    for row in rows:
        if (broken := row.broken(what)) is not None:
            raise InvalidGraph(f"{name}: {row.name}: {broken}")


def _check_fake_values(graph: fx.Graph, context: Context) -> None:
    """Computes the fake values of a rewritten attention and what follows again, and compares.

    Those of an attention that is not rewritten are skipped: its strides depend on the kernel that
    is picked.
    """
    after: set[fx.Node] = set()
    with fake_values(context.gm):
        for node in graph.nodes:
            follows = any(n in after for n in node.all_input_nodes)
            if node.target is not OPERATOR and not follows:
                continue
            after.add(node)
            if node.op != "call_function" or is_higher_order(node) or writes(node):
                continue
            try:
                value = rerun(node, {}, context)
            except Exception as error:
                raise InvalidGraph(f"{node.name}: {error}") from error
            if node.target is not SDPA and not same_layout(value, node.meta["val"]):
                raise InvalidGraph(f"{node.name}: its shape, dtype or strides are out of date")
