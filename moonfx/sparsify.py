"""The user's verbs: sparsify, report, explain.

What a verb needs is imported when it is called: torch.compile and sympy take longer to import than
torch itself, and many a process that imports moonfx calls none of its verbs.
"""

from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram

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
    disable_passes: Collection[str] = (),
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
        disable_passes: names of passes that do not run, to find out which one something comes from.
    Returns:
        The same object; for a GraphModule or an ExportedProgram a new one.
    Raises:
        TypeError, ValueError: for a bad argument, before anything is changed.
        NothingRewritten: from the first call, with on_miss="raise"; the model is then as before.
    """
    default = LayerPolicy(block, topk, sinks)
    policies = Policies(default, layers, dense_last, causal_only, recompute_routing, disable_passes)
    if isinstance(model, ExportedProgram):
        from moonfx.exported import sparsify_exported

        return sparsify_exported(model, policies, on_miss, compiler)  # type: ignore[return-value]
    from moonfx.modules import sparsify_module

    return sparsify_module(model, policies, on_miss, compiler)  # type: ignore[return-value]


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
        from moonfx.backend.records import report_of

        return report_of(None) or Report()
    if isinstance(model, torch.optim.Optimizer):
        return _report_optimizer(model)
    if isinstance(model, ExportedProgram):
        from moonfx.exported import report_exported

        return report_exported(model)
    from moonfx.modules import report_module

    return report_module(model)


def _report_optimizer(optimizer: torch.optim.Optimizer) -> Report:
    from moonfx.backend.records import report_of_step
    from moonfx.backend.step_messages import skipped

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
    disable_passes: Collection[str] = (),
    **kwargs: Any,
) -> Report:
    """Says what `sparsify` would do for one call, and changes nothing.

    The model is traced, not run: no attention is computed, parameters, buffers and the random
    state stay, and mutable arguments (a KV cache) are copied first.

    Args:
        model: as for `sparsify`.
        *args, **kwargs: what the model is called with; nothing for an ExportedProgram.
        block, topk, sinks, layers, dense_last, causal_only, disable_passes: as for `sparsify`.
    Raises:
        TypeError, ValueError: for a bad argument.
    """
    policies = Policies(
        LayerPolicy(block, topk, sinks), layers, dense_last, causal_only, False, disable_passes
    )
    if isinstance(model, ExportedProgram):
        if args or kwargs:
            raise TypeError("explain: an ExportedProgram holds its shapes; give no call arguments")
        from moonfx.exported import explain_exported

        return explain_exported(model, policies)
    from moonfx.modules import explain_module

    return explain_module(model, policies, args, kwargs)
