"""Writes a call of a Dynamo graph as an equal call was written before it, without tracing it.

    before  linear(x0, w0), linear(x1, w1), ...      the layers of a model are alike
    traced  linear.default(x0, w0)                   by make_fx
    replay  linear.default(x1, w1)                   from the first, where x1, w1 are like x0, w0

Only for calls whose operands are tensors of static shapes and plain constants, and which became
operators that write to nothing and read nothing but those operands: what such a call becomes
depends on the operands' metadata and on the modes that are on, and on nothing else. Whoever turns a
mode on or off forgets what is known here.
"""

import copy
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Key = tuple[Hashable, ...]

# Plain constants, whose repr and type say all of them (0.0 == -0.0 and 1 == True do not).
_OF_PYTHON = {bool, int, float, str, type(None), type(...)}
_CONSTANTS = {*_OF_PYTHON, torch.dtype, torch.device, torch.memory_format, torch.layout}
# What makes the nodes of one call differ from those of an equal one: where they come from.
_ORIGIN = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "custom",
    "recompute",
    "ac_graph_id",
    "has_backward_hook",
    "quantization_tag",
    "partitioner_tag",
)
_OF_OPERATOR = ("val", "tensor_meta", "original_aten", "torch_fn")


class _Unlike(Exception):
    """Something that a key cannot describe."""


@dataclass
class _Place:
    """In place of a node: which of the operands, and then of the steps, it is."""

    position: int


@dataclass
class Written:
    """The nodes that a call became, and how to write them for another call.

    Args:
        steps: target, name, args, kwargs and meta of each; a _Place stands for each node.
        result: which of the steps is the result.
        needs_grad: whether the result is part of an autograd graph.
    """

    steps: list[tuple[Any, str, Any, Any, dict[str, Any]]]
    result: int
    needs_grad: bool

    @property
    def value(self) -> torch.Tensor:
        """What the result is like."""
        value: torch.Tensor = self.steps[self.result][4]["val"]
        return value

    def replay(self, source: fx.Node, operands: Sequence[fx.Node], graph: fx.Graph) -> fx.Node:
        """Writes the nodes for another call, at the end of a graph; returns the result's.

        Args:
            source: the call, which says where the nodes come from.
            operands: the nodes of the tensors that it is called with.
        """
        origin = {k: copy.copy(source.meta[k]) for k in _ORIGIN if k in source.meta}
        known = list(operands)

        def in_place(x: Any) -> Any:
            return known[x.position] if type(x) is _Place else x

        for target, name, args, kwargs, meta in self.steps:
            args, kwargs = fx.node.map_aggregate((args, kwargs), in_place)
            node = graph.create_node("call_function", target, args, kwargs, name=name)
            node.meta.update(origin)
            node.meta.update(meta)
            known.append(node)
        return known[len(operands) + self.result]


def key_of(
    target: Any, args: Any, kwargs: Any, plain: Callable[[torch.Tensor], bool]
) -> tuple[Key, list[torch.Tensor]] | None:
    """What two calls must share to become the same nodes, and the tensors they are called with.

    None if that cannot be said.

    Args:
        plain: whether a tensor is no more than its metadata says.
    """
    tensors: list[torch.Tensor] = []

    def describe(x: Any) -> Hashable:
        if isinstance(x, torch.Tensor):
            for i, known in enumerate(tensors):
                if known is x:
                    return i
            if not plain(x):
                raise _Unlike
            tensors.append(x)
            return _metadata(x)
        kind = type(x)
        if kind in (tuple, list, fx.immutable_collections.immutable_list):
            return (kind, *map(describe, x))
        if kind in (dict, fx.immutable_collections.immutable_dict):
            return (kind, *((k, describe(v)) for k, v in x.items()))
        if kind is slice:
            return (kind, describe(x.start), describe(x.stop), describe(x.step))
        if kind in _CONSTANTS:
            return (kind, repr(x))
        raise _Unlike

    if not _of_torch(target):
        return None
    try:
        return (target, describe(args), describe(kwargs)), tensors
    except _Unlike:
        return None


def _of_torch(target: Any) -> bool:
    """Whether it is torch's or Python's own, and not a user's function, which may keep a state."""
    if isinstance(target, str | types.BuiltinFunctionType):
        return True
    return str(getattr(target, "__module__", "")).split(".")[0] == "torch"


def _metadata(x: torch.Tensor) -> Hashable:
    """Everything that an operator on a fake tensor may ask of it."""
    sizes = (*x.shape, *x.stride(), x.storage_offset())
    if not all(type(size) is int for size in sizes):
        raise _Unlike
    if x.layout is not torch.strided or x.is_conj() or x.is_neg() or x.is_inference():
        raise _Unlike
    return (len(x.shape), sizes, x.dtype, x.device, x.requires_grad)


def remember(
    nodes: list[fx.Node], operands: list[fx.Node], value: torch.Tensor, result: fx.Node | None
) -> Written | None:
    """What a call became, to be written again; None if it may not be.

    Args:
        nodes: the new nodes.
        operands: the nodes of the tensors that it was called with.
        value: the value of the `result`, which is one of the new nodes unless the call may not be.
    """
    places = {node: _Place(i) for i, node in enumerate(operands)}
    if len(places) < len(operands) or result is None or result not in nodes:
        return None

    def place(node: fx.Node) -> Any:
        return places[node]

    steps = []
    for node in nodes:
        target = node.target
        schema = getattr(target, "_schema", None)
        if schema is None or schema.is_mutable or not hasattr(target, "overloadpacket"):
            return None
        if not _static(node.meta.get("val")) or any(n not in places for n in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), place)
        meta = {k: node.meta[k] for k in _OF_OPERATOR if k in node.meta}
        steps.append((target, target.overloadpacket.__name__, args, kwargs, meta))
        places[node] = _Place(len(places))
    return Written(steps, nodes.index(result), value.requires_grad)


def _static(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(type(size) is int for size in value.shape)
