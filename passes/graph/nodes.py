"""Small readings of one node: its shape, dtype, arguments, the permutation or call that it is."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import body_position, is_captured
from moonfx.capture.sizes import expression
from moonfx.passes.graph.operators import SWAPS, TRANSPOSES

aten = torch.ops.aten

_INSERTED = "moonfx_inserted"


def shape(node: fx.Node) -> list[Any]:
    """The sizes of a tensor node as sympy expressions; [] for anything else."""
    value = node.meta.get("val")
    return [expression(n) for n in value.shape] if isinstance(value, torch.Tensor) else []


def dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name, as the operator's schema has it."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's node by the names in its schema, defaults where not given."""
    found: dict[str, Any] = {}
    for position, each in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = each.default_value if each.has_default_value() else None
        given = node.kwargs.get(each.name, default)
        positional = position < len(node.args) and not each.kwarg_only
        found[each.name] = node.args[position] if positional else given
    return found


def in_order(target: Any, named: dict[str, Any], least: str) -> tuple[Any, ...]:
    """A call's arguments by position: all, or those up to `least` where the others are defaults.

    Args:
        named: by the names of the operator's schema; what is missing is the default.
    """
    parameters = target._schema.arguments
    values = [named.get(x.name, x.default_value) for x in parameters]
    count = 1 + [x.name for x in parameters].index(least)
    later = zip(values[count:], parameters[count:], strict=True)
    plain = all(value is x.default_value or value == x.default_value for value, x in later)
    return tuple(values[:count] if plain else values)


def axis(node: fx.Node, dim: int) -> int:
    """A dim of the node counted from the front."""
    return dim % max(len(shape(node)), 1)


def permutation(node: fx.Node) -> list[int] | None:
    """Output dim -> input dim, or None if the node permutes nothing."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    rank = len(shape(source))
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in argument(node, 1, "dims")]
    if node.target in SWAPS:
        a, b = (d % max(rank, 1) for d in _two_dims(node))
    elif node.target is aten.numpy_T.default and rank > 2:
        return order[::-1]
    elif node.target in TRANSPOSES and rank >= 2:
        a, b = rank - 2, rank - 1
    elif node.target is aten.movedim.int:
        first, last = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order.remove(first)
        order.insert(last, first)
        return order
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def _two_dims(node: fx.Node) -> list[int]:
    return [v for v in (*node.args[1:], *node.kwargs.values()) if isinstance(v, int)]


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """The captured body that a higher-order node calls, or None."""
    position = body_position(node)
    if position is None:
        return None
    called = node.args[position[0]]
    if not (isinstance(called, fx.Node) and called.op == "get_attr"):
        return None
    body = getattr(node.graph.owning_module, str(called.target), None)
    return body if isinstance(body, fx.GraphModule) and is_captured(body) else None


def operands_of(call: fx.Node) -> tuple[Any, ...]:
    """What a higher-order node calls its body with, placeholder by placeholder."""
    position = body_position(call)
    return call.args[position[1] :] if position is not None else ()


def set_operands(call: fx.Node, operands: Iterable[Any]) -> None:
    call.args = (*call.args[: len(call.args) - len(operands_of(call))], *operands)


def operator_name(node: fx.Node) -> str:
    """The operator's name for a reason: "mul" of aten.mul.Tensor."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def call(target: Any, *args: Any, graph: fx.Graph | None = None, **kwargs: Any) -> fx.Node:
    """A new call where the graph is written at the moment, with its fake value."""
    if graph is None:
        graph = next(a for a in args if isinstance(a, fx.Node)).graph
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


# To compute the value of what is inserted from its arguments' values.
_COMPUTED = object()


def insert(
    target: Any,
    args: tuple[Any, ...],
    before: fx.Node,
    like: fx.Node | None = None,
    value: Any = _COMPUTED,
) -> fx.Node:
    """A new call right before a node, with its fake value and the place in the source of `like`.

    Args:
        value: its fake value, where the operator is not to be run on its arguments' to find it.
    """
    like = before if like is None else like
    kept = ("stack_trace", "nn_module_stack")
    meta = {k: like.meta[k] for k in kept if k in like.meta}
    node = insert_with_meta(target, args, before, {**meta, _INSERTED: True})
    if value is _COMPUTED:
        with torch.no_grad():
            value = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    node.meta["val"] = value
    return node


def insert_with_meta(
    target: Any,
    args: tuple[Any, ...],
    before: fx.Node,
    meta: Mapping[str, Any],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """A new call right before a node, of which is known what is known of another: its meta."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update(meta)
    return node


def origin(node: fx.Node) -> fx.Node:
    """The node of the captured graph that an inserted view reads."""
    while node.meta.get(_INSERTED):
        node = node.args[0]  # type: ignore[assignment]
    return node
