"""The verbs on an nn.Module or an fx.GraphModule: the passes run when it is called.

before  model(x) runs what nn.Module.compile put there, or forward
after   sparsify_module(model): model(x) runs a compiled call of the rewritten graphs, in which
        moonfx::moba_attention stands for each attention that the policy makes sparse
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from moonfx.backend.on_miss import ON_MISS, check_choice
from moonfx.backend.records import report_of
from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import (
    compile_call,
    compile_in_place,
    compiled_call,
    copy_of_graph_module,
    is_compiled_module,
    plain_call,
    set_compiled_call,
    stay_out_of_outer_graphs,
)
from moonfx.capture.dynamo_frames import empty_results
from moonfx.capture.inductor import COMPILERS
from moonfx.judged import judged
from moonfx.model_state import STATE, State, sparse_inside, state_of
from moonfx.policy import Policies
from moonfx.report.report import Report


def sparsify_module(
    model: torch.nn.Module, policies: Policies, on_miss: str, compiler: str
) -> torch.nn.Module:
    """The model, or a copy of a GraphModule, that runs sparse; arguments as `moonfx.sparsify`."""
    check_choice("on_miss", on_miss, ON_MISS)
    check_choice("compiler", compiler, COMPILERS)
    _check_model(model)
    policies.check_names(_canonical_names(model))
    _check_submodules(model)
    if isinstance(model, fx.GraphModule):
        model = copy_of_graph_module(model)
    old = state_of(model)
    before = old.before if old is not None else compiled_call(model)
    state = State(before, Backend(policies, compiler, model), on_miss)
    state.sparse = judged(model, compile_in_place(model, state.backend), state)
    if old is not None and old.hook is not None:
        old.hook.remove()
    state.hook = model.register_forward_pre_hook(stay_out_of_outer_graphs)
    set_compiled_call(model, state.sparse)
    model.__dict__[STATE] = state
    return model


def report_module(model: torch.nn.Module) -> Report:
    """What was compiled so far for a model; errors as `moonfx.report`."""
    state = state_of(model)
    if state is not None:
        own = state.backend.report
        if compiled_call(model) not in (state.sparse, state.dense):
            own.failures.append("the model was compiled anew after sparsify, and runs that")
        return own
    known = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    found = report_of(known)
    if found is None:
        inside = sparse_inside(model) if isinstance(model, torch.nn.Module) else []
        hint = f", but {', '.join(inside)} within it is: ask for its report" if inside else ""
        raise ValueError(
            "model must be under moonfx.sparsify, or compiled with backend='moonfx' and called "
            f"once; this {type(model).__name__} is neither{hint}"
        )
    return found


def explain_module(
    model: torch.nn.Module, policies: Policies, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Report:
    """What one call would make sparse, traced and not run."""
    _check_model(model)
    policies.check_names(_canonical_names(model))
    if isinstance(model, fx.GraphModule):
        model = copy_of_graph_module(model)
    backend = Backend(policies, "eager", model)

    def trace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        backend.rewrite(gm, example_inputs)
        return empty_results(gm) or gm.forward

    args, kwargs = tree_map(_copied, (args, kwargs))
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        compile_call(plain_call(model), trace)(*args, **kwargs)
    return backend.report


def _copied(argument: Any) -> Any:
    """An argument that the call may change (a KV cache); a tensor is only read."""
    return argument if isinstance(argument, torch.Tensor) else copy.deepcopy(argument)


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of each module, shared modules by all of theirs -> the name that reports use."""
    first = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: first[id(module)] for name, module in every}


def _check_submodules(model: torch.nn.Module) -> None:
    if inside := sparse_inside(model):
        raise ValueError(
            f"model holds modules under moonfx.sparsify already ({', '.join(inside)}), and one "
            "policy would undo the other: moonfx.restore them and use layers={name: policy}"
        )


def _check_model(model: object) -> None:
    if is_compiled_module(model):
        raise TypeError(
            "model is already compiled: give moonfx.sparsify the model itself, or use "
            "torch.compile(model, backend='moonfx')"
        )
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must be a torch.nn.Module that torch.compile takes, an fx.GraphModule or an "
            f"ExportedProgram, got {type(model).__name__}"
        )
