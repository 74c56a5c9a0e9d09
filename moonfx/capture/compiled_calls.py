"""torch.compile of a model's call, and where nn.Module.compile keeps it."""

import copy
import functools
import inspect
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch._dynamo import trace_rules
from torch._dynamo.code_context import code_context
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.external_utils import wrap_inline

from moonfx.capture.said_once import SaidOnce
from moonfx.capture.symbolic_flags import decide_flags

Call = Callable[..., Any]


def compile_call(
    call: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None = None
) -> Callable[..., Any]:
    """torch.compile of a call, by a backend; `dynamic` as torch.compile takes it."""
    return _as_ours(torch.compile(call, dynamic=dynamic, **_compile_options(backend)))


def compile_in_place(model: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """nn.Module.compile; returns the compiled call that it put on the model."""
    model.compile(**_compile_options(backend))
    compiled: Any = model._compiled_call_impl
    return _as_ours(compiled)


def compile_step(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of an optimizer's pure step by Inductor, as a graph that cannot break."""
    return torch.compile(call, fullgraph=True, dynamic=False, **_compile_options("inductor"))


def _compile_options(backend: Callable[..., Any] | str) -> dict[str, Any]:
    """torch.compile arguments; own cache entries, so that policies never evict each other."""
    decide_flags()
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"backend": backend, **({"isolate_recompiles": True} if isolated else {})}


# Whether a call that moonfx compiled is running. A plain bool, because Dynamo guards on its value.
ours_is_running = False
_running = 0
_running_lock = threading.Lock()


def _count_running(change: int) -> None:
    global ours_is_running, _running
    with _running_lock:
        _running += change
        ours_is_running = _running > 0


class TooManyGraphs(RuntimeError):
    """Dynamo would not compile one more variant of a model."""


# Prefill, chunks and decoding, each with and without padding, with and without gradients, are more
# than Dynamo's own limit of 8.
RECOMPILE_LIMIT = 64


def _as_ours(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a compiled call as every moonfx call must run.

    Python floats (softmax scale, norm eps) stay constants of the graph under dynamic shapes, a
    model that meets Dynamo's recompile limit is an error and not dense from then on, and
    `stay_out_of_outer_graphs` knows that the compilation is ours.
    """

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        config = torch._dynamo.config
        limit = max(RECOMPILE_LIMIT, config.recompile_limit)
        settings: dict[str, Any] = {
            "specialize_float": True,
            "recompile_limit": limit,
            "fail_on_recompile_limit_hit": True,
            # A deprecation warning inside torch.nn would break the graph where nothing resumes it.
            "reorderable_logging_functions": {*config.reorderable_logging_functions, warnings.warn},
        }
        if (ignored := getattr(config, "ignore_logging_functions", None)) is not None:
            settings["ignore_logging_functions"] = SaidOnce(ignored)
        # nn.TransformerEncoder's inference path is one operator that no pass can look into.
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _count_running(1)
        try:
            with torch._dynamo.config.patch(settings):
                return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise TooManyGraphs(
                f"the model was compiled in {limit} variants (torch._dynamo.config.recompile_limit)"
                " and would run dense from here; call it with fewer kinds of inputs, raise the "
                "limit, or moonfx.restore it. TORCH_LOGS=recompiles shows what differs"
            ) from error
        finally:
            _count_running(-1)
            torch.backends.mha.set_fastpath_enabled(fastpath)

    return run


def stay_out_of_outer_graphs(model: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook: a compilation around the model breaks its graph here and calls it.

    Without it Dynamo would trace through nn.Module.compile as if it were not there, and the model
    would be dense, silently. Where a graph must not break (fullgraph=True, torch.export), Dynamo's
    error carries the message.
    """
    if torch.compiler.is_compiling() and not ours_is_running and model.__dict__.get("_moonfx"):
        torch._dynamo.graph_break(
            msg="the model is under moonfx.sparsify: call moonfx.sparsify on the outer model, or "
            "moonfx.restore first"
        )


def plain_call(model: torch.nn.Module) -> Call:
    """What nn.Module.compile compiles: hooks and forward.

    Dynamo passes over functions of torch itself, as the forward of nn.TransformerEncoder is, unless
    they are called by another.
    """
    call: Call = model._call_impl
    return wrap_inline(call) if trace_rules.check(model.forward) else call


def compiled_call(model: torch.nn.Module) -> Call | None:
    """What calling the model runs instead of `plain_call`, if nn.Module.compile was used."""
    return model._compiled_call_impl


def set_compiled_call(model: torch.nn.Module, call: Call | None) -> None:
    model._compiled_call_impl = call


def is_left_out(module: torch.nn.Module) -> bool:
    """Whether torch.compiler.disable keeps a module, and all that it calls, from compilation."""
    context = getattr(module, "dynamo_ctx", None)
    if isinstance(context, torch._dynamo.eval_frame.DisableContext):
        return True
    return getattr(module.forward, "_torchdynamo_disable_recursive", None) is True


def is_compiled_module(model: object) -> bool:
    return isinstance(model, torch._dynamo.OptimizedModule)


def copy_of_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule of its own, of the same parameters and buffers.

    Dynamo is told where the code came from, so that its graph keeps each node's module.
    """
    shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    copied: fx.GraphModule = copy.deepcopy(gm, shared)
    ours = [k for k, h in gm._forward_pre_hooks.items() if h is stay_out_of_outer_graphs]
    for name, value in vars(gm).items():  # hooks and other attributes, which a deep copy loses
        if re.fullmatch(r"_(forward|backward)(_pre)?_hooks\w*", name):
            setattr(copied, name, type(value)((k, h) for k, h in value.items() if k not in ours))
        elif name not in ("_moonfx", "_compiled_call_impl"):
            vars(copied).setdefault(name, value)
    context: Any = code_context.get_context(copied.forward.__code__)
    context["orig_graphmodule"] = weakref.ref(copied)
    return copied
