"""One data flow of a whole run of a model: bodies inlined, the graphs after graph breaks joined.

    graph 1: x, w -> linear -> out 0          a linear(x, w) whose reader is the relu(...)
    graph 2: in 0 -> relu -> out 0            that the model returns

What parameters are used for is read here and not in the graphs, because a graph that Dynamo made
for one layer runs for all layers of its class, each time with other parameters.
"""

import heapq
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moonfx.capture.graph_nodes import buffer_value, input_name, placeholders
from moonfx.capture.sizes import hint_or_none
from moonfx.passes.graph.nodes import aten, body_of, operands_of
from moonfx.passes.graph.operators import SHAPE_ONLY

PARAMETER, INPUT, CONSTANT = "parameter", "input", "constant"

# Write into a part of a tensor, which later readers still read by its first name.
WRITES = {aten.copy_.default, aten.index_put_.default, aten.index_copy_.default}
# Make a tensor, and read of another one its shape.
CREATES = SHAPE_ONLY | {
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty.memory_format,
    aten.zeros.default,
    aten.full.default,
}
# Take of their second tensor its shape or dtype, and of the first its numbers.
LIKE_ANOTHER = {
    aten.type_as.default,
    aten.to.other,
    aten.expand_as.default,
    aten.view_as.default,
    aten.reshape_as.default,
}


@dataclass(eq=False)
class FlowValue:
    """One tensor, or tuple of tensors, that a run computes or is given.

    Args:
        target: the operator that computes it; of what is given, one of the words above.
        args, kwargs: of the operator; Values stand for what it reads, ints for symbolic sizes.
        shape: its sizes as traced; () for what is no tensor.
        name, meta, stack_trace: of the node that it comes from. The node itself would keep its
            graph alive.
        users: who reads it.
        returned: whether the model returns it.
        escapes: whether code that was not traced may read it.
        shared: whether its graph runs for several layers, so that its node names only the first.
        key: of a parameter, its id; of an input, its name.
        known: the values of a constant tensor.
    """

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    stack_trace: str | None = None
    users: list["FlowValue"] = field(default_factory=list)
    returned: bool = False
    escapes: bool = False
    shared: bool = False
    key: Any = None
    known: torch.Tensor | None = None

    @property
    def reads(self) -> list["FlowValue"]:
        """What it is computed of, each once; of some operators' tensors only the shape counts."""
        if self.target in CREATES:
            return []
        args = self.args[:1] if self.target in LIKE_ANOTHER else self.args
        return list(dict.fromkeys(values_in((args, self.kwargs))))

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument by position or name, as the operator's schema has it."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)


def values_in(given: Any) -> Iterator[FlowValue]:
    """The Values in the arguments of an operator."""
    if isinstance(given, FlowValue):
        yield given
    elif isinstance(given, tuple | list):
        for x in given:
            yield from values_in(x)
    elif isinstance(given, dict):
        yield from values_in(list(given.values()))


def base_of(view: FlowValue) -> FlowValue:
    """The tensor that a view is a part of."""
    while view.target not in (PARAMETER, INPUT, CONSTANT) and view.reads:
        if not getattr(view.target, "is_view", False) and view.target is not operator.getitem:
            break
        view = view.reads[0]
    return view


@dataclass
class GraphCall:
    """One call of a captured graph.

    Args:
        gm: the graph.
        inputs: what it was called with, parameters as themselves.
        results: what it gave, () if that is not known.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    results: Sequence[Any] = ()


class DataFlow:
    """The data flow of some calls of graphs, in the order of their run.

    Args:
        calls: the calls.
        returned: what the model returned, objects among the calls' results; None if all of them.
    """

    def __init__(self, calls: Sequence[GraphCall], returned: Sequence[Any] | None = None) -> None:
        self.values: list[FlowValue] = []
        self.parameters: dict[int, FlowValue] = {}
        self._made: dict[int, FlowValue] = {}
        self._written: dict[FlowValue, FlowValue] = {}
        self._read: set[FlowValue] = set()
        self._kept: list[Any] = []  # ids stay those of these objects while they live
        self._returned = None if returned is None else {id(x) for x in returned}
        runs = Counter(id(call.gm) for call in calls)
        for call in calls:
            first = len(self.values)
            self._add(call)
            for value in self.values[first:]:
                value.shared = runs[id(call.gm)] > 1
        for value in self._made.values():
            value.escapes &= value not in self._read
        self._kept.clear()
        self._made.clear()
        self.place = {value: i for i, value in enumerate(self.values)}
        self._active: dict[FlowValue, bool] = {}
        self._trained: dict[FlowValue, bool] = {}
        self._mark(self._active, INPUT)
        self._mark(self._trained, PARAMETER)

    def _mark(self, marks: dict[FlowValue, bool], given: str) -> None:
        """Marks all that is made of what is given, also by writing into a part of a tensor."""
        writers: dict[FlowValue, list[FlowValue]] = {}
        for value in self.values:
            if value.target in WRITES and isinstance(value.args[0], FlowValue):
                writers.setdefault(base_of(value.args[0]), []).append(value)
        marked = -1
        while marked != sum(marks.values()):
            marked = sum(marks.values())
            for value in self.values:
                made_of = (*value.reads, *writers.get(value, ()))
                if not marks.get(value):
                    found = value.target == given or any(marks.get(x, False) for x in made_of)
                    marks[value] = found

    def activate(self, values: Sequence[FlowValue]) -> None:
        """Says that some values are activations, and so what is made of them."""
        if values:
            self._active |= dict.fromkeys(values, True)
            self._mark(self._active, INPUT)

    def active(self, value: Any) -> bool:
        """Whether it is an activation, as what depends on an input of the model, and no weight."""
        return isinstance(value, FlowValue) and self._active[value]

    def trained(self, value: Any) -> bool:
        """Whether it depends on a parameter."""
        return isinstance(value, FlowValue) and self._trained[value]

    def _new(self, target: Any, node: fx.Node, **given: Any) -> FlowValue:
        tensor = node.meta.get("val")
        if isinstance(tensor, torch.Tensor):
            given["shape"] = tuple(_size(n) for n in tensor.shape)
            given["dtype"] = tensor.dtype
        origin = {k: node.meta[k] for k in ("nn_module_stack",) if k in node.meta}
        value = FlowValue(
            target, name=node.name, meta=origin, stack_trace=node.stack_trace, **given
        )
        self.values.append(value)
        for read in value.reads:
            read.users.append(value)
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable and value.args:
            self._wrote(value.args[0], value)
        if target in WRITES and isinstance(value.args[0], FlowValue):
            value.users.append(base_of(value.args[0]))
        return value

    def _wrote(self, before: Any, after: FlowValue) -> None:
        """Says that what `before` named is now `after`."""
        if isinstance(before, FlowValue):
            self._written |= {x: after for x, y in self._written.items() if y is before}
            self._written[before] = after

    def _add(self, call: GraphCall) -> None:
        given = list(map(self._given, placeholders(call.gm.graph), call.inputs))
        results = self._inline(call.gm, given)
        for value, tensor in zip(given, call.inputs, strict=True):
            if value in self._written:  # the graphs to come read what this one wrote
                self._made[id(tensor)] = self._written[value]
        given_back = call.results or [object() for _ in results]
        self._kept.append(given_back)
        for value, result in zip(results, given_back, strict=True):
            if not isinstance(value, FlowValue):
                continue
            if self._returned is None:
                value.returned = True
                continue
            self._made[id(result)] = value
            value.returned |= id(result) in self._returned
            value.escapes = not value.returned

    def _given(self, node: fx.Node, given: Any) -> Any:
        if isinstance(given, torch.nn.Parameter):
            if id(given) not in self.parameters:
                self.parameters[id(given)] = self._new(PARAMETER, node, key=id(given))
            return self.parameters[id(given)]
        if isinstance(given, torch.Tensor) and id(given) in self._made:
            self._read.add(self._made[id(given)])
            return self._made[id(given)]
        if not isinstance(given, torch.Tensor):
            return _size(node.meta.get("val", given))
        known = buffer_value(node)
        if known is not None:
            return self._new(CONSTANT, node, known=_small(known))
        value = self._new(INPUT, node, key=(input_name(node) or (False, ""))[1])
        self._made[id(given)] = value
        return value

    def _inline(self, gm: fx.GraphModule, operands: list[Any]) -> Sequence[Any]:
        """The results of a graph, or of a body, called with operands."""
        made: dict[fx.Node, Any] = {}
        rest = iter(operands)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(rest)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], made.__getitem__)
                return results if isinstance(results, tuple | list) else (results,)
            elif node.op == "get_attr":
                made[node] = self._constant(node)
            elif (body := body_of(node)) is not None:
                given = fx.map_arg(tuple(operands_of(node)), made.__getitem__)
                made[node] = tuple(self._inline(body, list(given)))
            elif node.target is operator.getitem and isinstance(made[node.args[0]], tuple):
                made[node] = made[node.args[0]][node.args[1]]
            elif node.target is aten.broadcast_tensors.default:
                made[node] = self._broadcast(node, fx.map_arg(node.args[0], made.__getitem__))
            elif isinstance(node.meta.get("val"), torch.SymInt | int):
                made[node] = _size(node.meta["val"])
            else:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
                made[node] = self._new(node.target, node, args=args, kwargs=kwargs)
        return ()

    def _broadcast(self, node: fx.Node, tensors: Sequence[Any]) -> tuple[FlowValue, ...]:
        """Tensors that are expanded together, each by itself: they do not meet."""
        made = []
        for x, like in zip(tensors, node.meta["val"], strict=True):
            shape = tuple(map(_size, like.shape))
            given = {"args": (x, shape), "shape": shape, "dtype": like.dtype}
            made.append(self._new(aten.expand.default, node, **given))
        return tuple(made)

    def _constant(self, node: fx.Node) -> Any:
        held = getattr(node.graph.owning_module, str(node.target), None)
        known = held if isinstance(held, torch.Tensor) and _is_real(held) else None
        return self._new(CONSTANT, node, known=None if known is None else _small(known))


class Worklist:
    """Values to look at, in the order of the run: what one reads has been looked at before it."""

    def __init__(self, flow: DataFlow, values: Sequence[FlowValue]) -> None:
        self.flow = flow
        self.heap: list[int] = []
        self.known: set[int] = set()
        self.add(values)

    def add(self, values: Sequence[FlowValue]) -> None:
        for place in map(self.flow.place.__getitem__, values):
            if place not in self.known:
                self.known.add(place)
                heapq.heappush(self.heap, place)

    def __contains__(self, value: FlowValue) -> bool:
        return self.flow.place[value] in self.known

    def __iter__(self) -> Iterator[FlowValue]:
        while self.heap:
            yield self.flow.values[heapq.heappop(self.heap)]


def _is_real(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def _small(known: torch.Tensor) -> torch.Tensor | None:
    """The numbers of an index; a large one, as of a mask, is not kept."""
    index = not known.is_floating_point() and not known.is_complex()
    return known if index and known.numel() <= 2**20 else None


def _size(given: Any) -> Any:
    """A size as traced; of one that only the run knows, 1."""
    if not isinstance(given, torch.SymInt):
        return given
    known = hint_or_none(given)
    return 1 if known is None else known
