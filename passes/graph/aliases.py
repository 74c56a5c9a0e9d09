"""Which nodes of a graph are written to in place, directly or through a view.

What an operator shares and writes is read from its schema and from `unmarked_aliases`. A node
without a schema (a method of a tensor subclass, a function left as it was written) may return any
operand's memory, is never dead, and writes as torch's names say: mul_, operator.imul, out=.
"""

import functools
import operator

import torch
from torch import fx

from moonfx.capture.graph_nodes import is_data, is_higher_order, opaque_body, placeholders
from moonfx.passes.graph import unmarked_aliases
from moonfx.passes.graph.nodes import argument, body_of, operands_of
from moonfx.passes.graph.union_find import UnionFind

aten = torch.ops.aten
# Changes what autograd thinks of a tensor, never its values.
_HARMLESS = {aten.detach_.default}
# Higher-order operators that only read.
_READ_ONLY = ("flex_attention",)
# Functions without a schema: on numbers, and of torch's own names.
_ON_NUMBERS = ("_operator", "operator", "math", "builtins")
_NAMED = ("_operator", "operator", "torch")


def is_opaque(node: fx.Node) -> bool:
    """Whether the effects of a node are unknown: it is no operator with a schema."""
    if node.op in ("call_method", "call_module"):
        return True
    if node.op != "call_function" or hasattr(node.target, "_schema"):
        return False
    if node.target is operator.getitem or is_data(node):
        return False
    module = str(getattr(node.target, "__module__", ""))
    name = str(getattr(node.target, "__name__", ""))
    on_numbers = module in _ON_NUMBERS and not any(map(_holds_tensor, node.all_input_nodes))
    return is_higher_order(node) or not (on_numbers or name.startswith("sym_"))


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(x, torch.Tensor) for x in values)


def aliases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the node's result may share."""
    if node.op == "call_function" and is_higher_order(node):
        return _body_aliases(node)
    if node.target is operator.getitem or is_data(node) or is_opaque(node):
        return node.all_input_nodes
    places = _marked(node.target)[0]
    marked = [n for place in places for n in _nodes(argument(node, *place))]
    return marked or unmarked_aliases.shared(node)


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes into."""
    if node.op == "call_function" and is_higher_order(node):
        return _body_writes(node)
    if is_opaque(node):
        return node.all_input_nodes if _writes_by_name(node) else []
    if node.target in _HARMLESS:
        return []
    places = _marked(node.target)[1]
    marked = [n for place in places for n in _nodes(argument(node, *place))]
    return marked or unmarked_aliases.written(node)


def _writes_by_name(node: fx.Node) -> bool:
    """Whether a node of unknown effects may write: by its name, where that is one of torch's."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    # torch's functions of C have no module.
    module = str(getattr(node.target, "__module__", None) or "torch")
    if node.op != "call_method" and module.split(".")[0] not in _NAMED:
        return True
    in_place = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(node.kwargs.get("out") or node.kwargs.get("inplace"))


# x *= y and the like, by function and by method.
_IN_PLACE = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "setitem", "delitem"),
}
Places = list[tuple[int, str]]


@functools.cache
def _marked(target: object) -> tuple[Places, Places]:
    """Which arguments an operator's schema says that its result shares, and which it writes."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return [], []
    marked = [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments) if a.alias_info]
    shares = any(r.alias_info is not None for r in schema.returns)
    shared = [(i, name) for i, name, _ in marked] if shares else []
    return shared, [(i, name) for i, name, info in marked if info.is_write]


def _body_writes(node: fx.Node) -> list[fx.Node]:
    """What a higher-order operator writes: what its body does, or all where that is hidden."""
    if any(name in str(node.target) for name in _READ_ONLY):
        return []
    body = body_of(node)
    if body is None:
        return _tensors(node) if _may_write(node) else []
    written = last_writes(body.graph)
    return [outside for inside, outside in _operands(node, body) if inside in written]


def _may_write(node: fx.Node) -> bool:
    """Whether a body that no pass looks into may write, by the names of what it calls."""
    bodies = [body for n in node.all_input_nodes if (body := opaque_body(n)) is not None]
    if len(bodies) != 1:
        return True
    (body,) = bodies
    calls = [n for n in body.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return any(hasattr(n.target, "_schema") or n.op == "call_module" for n in calls) or any(
        map(_writes_by_name, calls)
    )


def _body_aliases(node: fx.Node) -> list[fx.Node]:
    """The operands that a body's results may lie in, or all where the body is hidden."""
    if any(name in str(node.target) for name in _READ_ONLY):
        return []
    body = body_of(node)
    if body is None:
        return _tensors(node)
    memory = UnionFind[fx.Node]()
    for inner in body.graph.nodes:
        for source in aliases(inner) if inner.op != "output" else ():
            memory.join(source, inner)
    returned = {memory.find(n) for n in body.graph.output_node().all_input_nodes}
    return [outside for inside, outside in _operands(node, body) if memory.find(inside) in returned]


def _operands(node: fx.Node, body: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Each placeholder of a body and the node that it is called with."""
    pairs = zip(placeholders(body.graph), operands_of(node), strict=True)
    return [(p, a) for p, a in pairs if isinstance(a, fx.Node)]


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _nodes(value: object) -> list[fx.Node]:
    if isinstance(value, list | tuple):
        return [n for n in value if isinstance(n, fx.Node)]
    return [value] if isinstance(value, fx.Node) else []


def made_in_place(node: fx.Node, settled: set[fx.Node]) -> list[fx.Node]:
    """What the node writes to before anyone else reads it, as zeros(..).masked_fill_(..) does.

    Whoever reads the memory reads it through the node's result, and so after the write. `settled`:
    the nodes of which this is known already, so that such writes may follow one another.
    """
    targets = writes(node)
    if len(targets) != 1 or is_opaque(node):
        return []
    (target,) = targets
    fresh = hasattr(target.target, "_schema") and not aliases(target)
    lone = list(target.users) == [node] and sum(x is target for x in node.all_input_nodes) == 1
    if not (lone and (fresh or target in settled)):
        return []
    return [target, node]


def last_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node whose memory is written to -> the last operator that writes it."""
    memory = UnionFind[fx.Node]()
    constants: dict[object, fx.Node] = {}
    written: list[tuple[fx.Node, fx.Node]] = []
    settled: set[fx.Node] = set()
    for node in graph.nodes:
        for source in aliases(node):
            memory.join(source, node)
        if node.op == "get_attr":
            memory.join(constants.setdefault(node.target, node), node)
        settled.update(made := made_in_place(node, settled))
        written += [(target, node) for target in writes(node) if target not in made]
    last = {memory.find(target): writer for target, writer in written}
    return {n: last[memory.find(n)] for n in graph.nodes if memory.find(n) in last} if last else {}
