"""The user's verbs: sparsify, report, explain, full_attention, restore."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from moonfx.backend.on_miss import ON_MISS, NothingRewritten, check_choice, miss
from moonfx.backend.records import Record, report_of, report_of_step
from moonfx.backend.rewriter import Backend
from moonfx.backend.step_messages import skipped
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
from moonfx.exported import explain_exported, report_exported, sparsify_exported
from moonfx.model_state import STATE, State, restore, sparse_inside, state_of
from moonfx.policy import LayerPolicy, Layers, Policies
from moonfx.report.report import Report

Model = TypeVar("Model", bound=torch.nn.Module | ExportedProgram)


def sparsify(
    model: Model,
    block: int = 4096,
    topk: int = 12,
    *,
    sinks: int = 1,
    layers: Layers | None = None,
    dense_last: int = 0,
    causal_only: bool = True,
    recompute_routing: bool = False,
    on_miss: str = "warn",
    compiler: str = "inductor",
) -> Model:
    """Makes a model run its dense causal attention as MoBA block-sparse attention.

    In place, through `nn.Module.compile`: class, parameters, `state_dict` keys, `generate` and
    `save_pretrained` stay. Compilation happens at the first call; `report` then says what became
    of each attention. Calling it again replaces the policy, `restore` undoes it. A compilation
    around the model (torch.compile of a model that contains it) leaves it sparse, by a graph break.
    What calls `model.forward` goes past it, as past nn.Module.compile: sparsify the outermost
    module (a PEFT wrapper, say).

    A torch.export.ExportedProgram is rewritten at once, into a new program with the same state:
    the given one is unchanged. A mask that is proved from a buffer's values is proved for those in
    the program at that time: load others before, not after. Nor is an fx.GraphModule changed, of
    which a copy that shares its parameters is returned. `restore` has nothing to undo in either:
    keep what you gave.

    Args:
        model: any nn.Module that torch.compile takes, an fx.GraphModule or an ExportedProgram.
        block: tokens per block.
        topk: blocks that each query attends, its own and the sinks counted.
        sinks: first blocks that are always attended. A model trained with dense attention parks
            attention on its first tokens; 0 is the paper's rule, for models trained with MoBA.
        layers: {module name | "re:<regex>" | attention index: LayerPolicy | None}; None keeps a
            layer dense. The first that fits wins: name, regex, index, then block/topk/sinks.
        dense_last: how many attentions at the end of the model stay dense.
        causal_only: False makes bidirectional self-attention (encoders, ViTs) sparse as well.
        recompute_routing: choose the blocks again in the backward, where a GPU kernel would keep
            4 topk bytes per token and head from the forward; the same gradients, a little slower.
        on_miss: "warn", "raise" or "ignore" when the first call finds nothing to rewrite.
        compiler: "inductor", "aot_eager" or "eager": what runs the rewritten graph. Not for an
            ExportedProgram, which runs as its user runs it.
    Returns:
        The same object; for a GraphModule or an ExportedProgram a new one.
    Raises:
        TypeError, ValueError: for a bad argument, before anything is changed.
        NothingRewritten: from the first call, with on_miss="raise"; the model is then as before.
    """
    default = LayerPolicy(block, topk, sinks)
    policies = Policies(default, layers, dense_last, causal_only, recompute_routing)
    check_choice("on_miss", on_miss, ON_MISS)
    check_choice("compiler", compiler, COMPILERS)
    if isinstance(model, ExportedProgram):
        if compiler != "inductor":
            raise ValueError(
                f"compiler={compiler!r} is not for an ExportedProgram, which is rewritten and not "
                "compiled: call its module() as it is, or give that to torch.compile"
            )
        return sparsify_exported(model, policies, on_miss)  # type: ignore[return-value]
    _check_model(model)
    policies.check_names(_canonical_names(model))
    _check_submodules(model)
    if isinstance(model, fx.GraphModule):
        model = copy_of_graph_module(model)  # type: ignore[assignment]
    old = state_of(model)
    before = old.before if old is not None else compiled_call(model)
    state = State(before, Backend(policies, compiler, model), on_miss)
    state.sparse = _judged(model, compile_in_place(model, state.backend), state)
    if old is not None and old.hook is not None:
        old.hook.remove()
    state.hook = model.register_forward_pre_hook(stay_out_of_outer_graphs)
    set_compiled_call(model, state.sparse)
    model.__dict__[STATE] = state
    return model


def _judged(
    model: torch.nn.Module, compiled: Callable[..., Any], state: State
) -> Callable[..., Any]:
    """Runs the compiled call; after each that compiled, says what `on_miss` wants said."""

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = compiled(*args, **kwargs)
        if state.judged < len(state.backend.records):
            new = state.backend.records[state.judged :]
            first, state.judged = state.judged == 0, len(state.backend.records)
            _judge(model, state, new, first)
        elif not state.judged and not state.skipped:
            state.skipped = True
            _judge(model, state, [], True)
        return result

    return run


def _judge(model: torch.nn.Module, state: State, new: Sequence[Record], first_call: bool) -> None:
    """The first call must rewrite something; a later one must not lose what it rewrote."""
    backend, what = state.backend, type(model).__name__
    report = backend.report_on(new)
    if not first_call:
        lost = report.declined or any(record.failure for record in new)
        if lost and not report.rewritten and state.on_miss != "ignore":
            miss("warn", report, what, f"a new kind of call of {what} is dense")
        return
    try:
        if not new:
            problem = (
                f"nothing of {what} was compiled, and it runs dense: it, or what calls it, is "
                "under torch.compiler.disable, torch.vmap or another transform of torch.func"
            )
            miss(state.on_miss, report, what, problem)
        elif not report.rewritten:
            miss(state.on_miss, report, what)
        elif unused := backend.unused():
            problem = f"no attention of {what} fits layers[{', '.join(unused)}]"
            miss(state.on_miss, report, what, problem)
    except NothingRewritten:
        restore(model)
        raise


def report(
    model: torch.nn.Module | ExportedProgram | torch.optim.Optimizer | None = None,
) -> Report:
    """What was compiled so far for a model under `sparsify` or torch.compile(backend="moonfx").

    Of an ExportedProgram: what `sparsify` did to make it. Of an optimizer: what backend "moonfx"
    did to its step. Of nothing: what backend "moonfx" did to all graphs that are still in use.

    Raises:
        ValueError: if moonfx knows nothing of the model or optimizer.
    """
    if model is None:
        return report_of(None) or Report()
    if isinstance(model, torch.optim.Optimizer):
        return _report_optimizer(model)
    if isinstance(model, ExportedProgram):
        return report_exported(model)
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


def _report_optimizer(optimizer: torch.optim.Optimizer) -> Report:
    found = report_of_step(optimizer)
    if found is None:
        raise ValueError(
            "the optimizer's step must be compiled with torch.compile(optimizer.step, "
            f"backend='moonfx') and called once; that of this {type(optimizer).__name__} is not"
            f"{skipped()}"
        )
    return found


def explain(
    model: torch.nn.Module | ExportedProgram,
    *args: Any,
    block: int = 4096,
    topk: int = 12,
    sinks: int = 1,
    layers: Layers | None = None,
    dense_last: int = 0,
    causal_only: bool = True,
    **kwargs: Any,
) -> Report:
    """Says what `sparsify` would do for one call, and changes nothing.

    The model is traced, not run: no attention is computed, parameters, buffers and the random
    state stay, and mutable arguments (a KV cache) are copied first.

    Args:
        model: as for `sparsify`.
        *args, **kwargs: what the model is called with; nothing for an ExportedProgram.
        block, topk, sinks, layers, dense_last, causal_only: the policy, as for `sparsify`.
    Raises:
        TypeError, ValueError: for a bad argument.
    """
    policies = Policies(LayerPolicy(block, topk, sinks), layers, dense_last, causal_only)
    if isinstance(model, ExportedProgram):
        if args or kwargs:
            raise TypeError("explain: an ExportedProgram holds its shapes; give no call arguments")
        return explain_exported(model, policies)
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
