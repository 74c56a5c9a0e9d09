"""The modes that each node of a graph runs under: gradients on or off, and the autocasts it is in.

Dynamo writes entering and leaving a mode as nodes of their own, in order:

    _set_grad_enabled(False); softmax; _set_grad_enabled(True)      with torch.no_grad(): softmax
    a = _enter_autocast(...); matmul; _exit_autocast(a)             with torch.autocast(...): matmul
"""

from dataclasses import dataclass, replace

from torch import fx


@dataclass(frozen=True)
class Mode:
    """What holds at a node.

    Args:
        gradients: whether autograd records.
        autocast: the nodes that entered an autocast or inference mode which is not yet left.
    """

    gradients: bool
    autocast: tuple[fx.Node, ...] = ()


_ENTER = ("_enter_autocast", "_enter_inference_mode")
_EXIT = ("_exit_autocast", "_exit_inference_mode")


def switches_gradients(node: fx.Node) -> bool:
    """Whether a node switches gradients on or off, and does nothing else."""
    return getattr(node.target, "__name__", "") == "_set_grad_enabled"


def modes(graph: fx.Graph, start: Mode) -> dict[fx.Node, Mode]:
    """The mode of each node, where the graph is entered with `start`."""
    found: dict[fx.Node, Mode] = {}
    now = start
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if switches_gradients(node):
            now = replace(now, gradients=bool(node.args[0]))
        elif name in _ENTER:
            now = replace(now, autocast=(*now.autocast, node))
        elif name in _EXIT:
            now = replace(now, autocast=tuple(n for n in now.autocast if n is not node.args[0]))
        found[node] = now
    return found


def inside(call: fx.Node, mode: Mode) -> Mode:
    """The mode that a body starts with, where the node that calls it has `mode`.

    wrap_with_set_grad_enabled(False, body, ...), wrap_with_autocast(*autocast, body, ...): what
    torch.export makes of a region.
    """
    name = getattr(call.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        return replace(mode, gradients=bool(call.args[0]))
    if name == "wrap_with_autocast":
        return replace(mode, autocast=(*mode.autocast, call))
    return mode
