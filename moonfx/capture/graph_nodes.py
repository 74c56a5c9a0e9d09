"""What a captured graph says of its nodes: inputs, buffers, nested bodies, module, source line."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from moonfx.capture.functorch_regions import Region, under_transform

# Higher-order operators that call a body with their last arguments: where among the arguments the
# body is, and where its own begin. The passes look into these bodies. Every other one stays exactly
# as it was written.
BODY_OPERATORS = {
    "tag_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
}
CAPTURED = "moonfx_captured"
BUFFER = "moonfx_buffer"
INPUT = "moonfx_input"
TRAINED = "moonfx_trained"
_HELD = re.compile(r"_(parameters|buffers)\b")
# What Dynamo makes of tensor.data, where this torch has it.
DATA = getattr(torch._C._autograd, "_get_data_attr", None)


def is_captured(gm: torch.nn.Module) -> bool:
    """Whether the graph is in pre-dispatch ATen, so that passes may look at it."""
    return bool(getattr(gm, "meta", {}).get(CAPTURED))


def buffer_value(node: fx.Node) -> torch.Tensor | None:
    """The value of a placeholder that is a module's buffer, of a constant tensor, else None."""
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
    else:
        value = node.meta.get(BUFFER)
    return value if isinstance(value, torch.Tensor) else None


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in the order in which it is called with them."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def input_name(node: fx.Node) -> tuple[bool, str] | None:
    """Whether an input of the graph is part of the module that it starts in, and its name there.

    None if the node is no input, or Dynamo does not say where it came from.
    """
    if node.op != "placeholder":
        return None
    if INPUT in node.meta:
        inside, name = node.meta[INPUT]
        return bool(inside), str(name)
    words = re.findall(r"\['([^']+)'\]", _source(node)) or [""]
    first, *rest = (w for w in words if w not in ("_buffers", "_parameters", "_modules"))
    if first == "self" and rest:
        return True, ".".join(rest)
    name = [first, *rest][-1]
    return (False, name) if name else None


def held_by_module(node: fx.Node) -> bool:
    """Whether a node is a tensor of a module or of the graph itself, and not given at a call."""
    if node.op == "get_attr" or BUFFER in node.meta:
        return True
    if INPUT in node.meta:
        return bool(node.meta[INPUT][0])
    return node.op == "placeholder" and bool(_HELD.search(_source(node)))


def _source(node: fx.Node) -> str:
    """Where Dynamo says that an input of the graph came from, as Python; "" if it does not say."""
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(source() if callable(source) else source)


def may_be_trained(node: fx.Node) -> bool:
    """Whether an input or a tensor that the graph holds may need a gradient."""
    if node.op not in ("placeholder", "get_attr"):
        return False
    return bool(node.meta.get(TRAINED, buffer_value(node) is None))


def nested_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph itself, then each captured body inside it, depth first."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            child = getattr(gm, str(node.target), None)
            if isinstance(child, fx.GraphModule) and is_captured(child):
                yield from nested_graphs(child)


def opaque_body(node: fx.Node) -> fx.GraphModule | None:
    """The graph that a get_attr node reads, if it is one that the passes do not rewrite."""
    held = (
        getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    )
    body = held.held[0] if isinstance(held, Region) else held
    return body if isinstance(body, fx.GraphModule) and not is_captured(body) else None


def body_position(node: fx.Node) -> tuple[int, int] | None:
    """Where a higher-order node's body is among its arguments, and where the body's own begin.

    None if it calls no body, or one that the passes do not look into.
    """
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return None
    return BODY_OPERATORS.get(node.target.name())


def is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) or node.target is under_transform


@functools.cache
def is_composite(target: Any) -> bool:
    """Whether torch makes an operator of others, and so may hand back what it was given."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key))
    except RuntimeError:  # known to Python and not to the dispatcher
        return True


def is_data(node: fx.Node) -> bool:
    """Whether a node is tensor.data."""
    return DATA is not None and node.target is DATA


class Traced(Protocol):
    """What a node of a graph says of where it came from."""

    @property
    def meta(self) -> dict[str, Any]: ...

    @property
    def stack_trace(self) -> str | None: ...


def module_path(node: Traced, names: dict[int, str], root: str | None) -> str:
    """The name of the innermost module that the node came from, "" for the model itself.

    Args:
        names: id of each module of the user's model -> its qualified name.
        root: the name of the module that the graph starts in, see `graph_root`.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return root or ""
    key, (path, _) = list(stack.items())[-1]
    ident = str(key).split("@")[0]
    if ident.isdigit() and int(ident) in names:
        return names[int(ident)]
    return f"{root or ''}.{name_in_model(path)}".strip(".")


def name_in_model(path: str) -> str:
    return re.sub(r"^L\['\w+'\]\.?", "", str(path))


def graph_root(
    gm: fx.GraphModule, example_inputs: Sequence[Any], parameter_names: dict[int, str]
) -> str | None:
    """The name of the module that a Dynamo graph starts in: "" for the model itself.

    After a graph break, a graph starts in a layer, and Dynamo runs it for every layer of that
    class. None if the graph has no parameter to tell by.

    Args:
        parameter_names: id of each parameter of the user's model -> its qualified name.
    """
    for node, value in zip(placeholders(gm.graph), example_inputs, strict=True):
        name = parameter_names.get(id(value))
        if name is None:
            continue
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        text = source() if callable(source) else source
        # L['self']._modules['layers']._modules['0']._parameters['weight']
        relative = ".".join(re.findall(r"\['([^']+)'\]", str(text))[1:])
        if relative and f".{name}".endswith(f".{relative}"):
            return name[: len(name) - len(relative)].rstrip(".")
    return None


def source_line(node: Traced) -> str:
    """file.py:line in the user's code, innermost frame; "unknown" if the trace has none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    if not frames:
        return "unknown"
    name, number = frames[-1]
    generated = re.fullmatch(r"<eval_with_key>\.\d+(?: from (\S+) in .*)?", name)
    if generated is None:
        return f"{Path(name).name}:{number}"
    # A GraphModule's own code: where its model was written, if that is known, and the graph's line.
    where = f"{Path(generated[1]).name}, " if generated[1] else ""
    return f"{where}graph line {number}"


def name_invoked_bodies(gm: fx.GraphModule, retraced: bool) -> None:
    """Gives the bodies of nested compile regions names by what they now hold.

    Regions of one name are compiled once: those that were alike and are now different must not
    share it, and those that are still alike should. AOTAutograd asks the results' fake values which
    of them need gradients, and make_fx's do not know: without them it finds out by itself.
    """
    known: dict[tuple[Any, ...], str] = {}
    for graph in nested_graphs(gm):
        for node in graph.graph.nodes:
            if node.op != "call_function" or str(node.target) != "invoke_subgraph":
                continue
            body = getattr(graph, str(node.args[0].target))
            key = (node.args[1], _content(body))
            same = sum(old == node.args[1] for old, _ in known)
            node.update_arg(1, known.setdefault(key, f"{node.args[1]}_moonfx_{same}"))
            for result in body.graph.output_node().all_input_nodes if retraced else ():
                result.meta.pop("val", None)


def _content(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What a graph computes: equal for two graphs only if they are interchangeable."""
    held = [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"]
    parts = [_content(x) if isinstance(x, fx.GraphModule) else id(x) for x in held]
    return (str(gm.graph), *parts)
