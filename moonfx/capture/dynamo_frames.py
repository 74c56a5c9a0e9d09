"""What Dynamo compiles at the moment: whose code, which piece of it, and why it was broken."""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext
from torch.optim.optimizer import Optimizer


def empty_results(gm: fx.GraphModule) -> Callable[..., Any] | None:
    """A function that returns zeros of the shapes that a Dynamo graph returns, without running it.

    None if a shape depends on an input, or a result is not a tensor.
    """
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    values = [getattr(n, "meta", {}).get("example_value") for n in output.args[0]]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and type(v.numel()) is int]
    if len(tensors) != len(values):
        return None

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros((), dtype=v.dtype, device=v.device).expand(v.shape) for v in tensors
        )

    return run


def break_reasons() -> Counter[str]:
    """Why Dynamo broke graphs or left functions to Python so far, and how often."""
    return Counter(torch._dynamo.utils.counters.get("unimplemented", {}))


def is_piece(gm: fx.GraphModule) -> bool:
    """Whether a graph break cut this Dynamo graph off from the rest of its function."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    frames = [frame.name for frame in getattr(reason, "user_stack", None) or []]
    resumed = any(name.startswith("torch_dynamo_resume_in") for name in frames)
    return resumed or bool(getattr(reason, "graph_break", False))


def returns_gradients(gm: fx.GraphModule) -> bool:
    """Whether gradients flow through something that a Dynamo graph returns."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    values = (n.meta.get("example_value") for n in output.all_input_nodes)
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def is_last_piece_of_step(gm: fx.GraphModule) -> bool:
    """Whether this Dynamo graph is what remains of an optimizer's `step` after a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    frames = [frame.name for frame in getattr(reason, "user_stack", None) or []]
    resumed = frames[:1] and frames[0].startswith("torch_dynamo_resume_in_step")
    return bool(resumed) and not getattr(reason, "graph_break", False)


def break_after(gm: fx.GraphModule) -> str | None:
    """Where and why Dynamo cut this graph off from what follows it, None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    frames = list(getattr(reason, "user_stack", None) or [])
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    return where + str(getattr(reason, "reason", "")).split("\n")[0]


def graph_breaks() -> list[str]:
    """Why Dynamo broke graphs since it was last reset: the first line of each cause."""
    causes = torch._dynamo.utils.counters["graph_break"]
    return list(dict.fromkeys(str(cause).split("\n")[0] for cause in causes))


def compiled_frame() -> int | None:
    """A number for the code that Dynamo compiles now, the same when it compiles it anew."""
    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


def owner() -> Optimizer | torch.nn.Module | None:
    """The optimizer or module whose method Dynamo compiles, or else the nearest that called it."""
    found = (_owner_in(scope) for scope in _scopes())
    return next((each for each in found if each is not None), None)


def is_called_by_broken_step() -> bool:
    """Whether Dynamo compiles a function by itself that an optimizer's step calls.

    That is how it goes on with what a step calls whose graph is broken.
    """
    own = _owner_in(next(_scopes()))
    return own is None and isinstance(owner(), Optimizer) and bool(graph_breaks())


def _owner_in(scope: dict[str, Any]) -> Optimizer | torch.nn.Module | None:
    arguments = scope.get("args")  # of a decorator around the method
    first = arguments[:1] if isinstance(arguments, tuple) else ()
    for each in (scope.get("self"), *first):
        if isinstance(each, Optimizer):
            return each
        if isinstance(each, torch.nn.Module) and not isinstance(each, fx.GraphModule):
            return each
    return None


def _scopes() -> Iterator[dict[str, Any]]:
    """The variables of the function that Dynamo compiles, and of its callers from the inside out.

    The function itself does not run yet; between it and its callers stand Dynamo's own frames.
    """
    with contextlib.suppress(AttributeError):  # nothing is compiled
        yield InstructionTranslator.current_tx().output.local_scope
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back
