"""The Dynamo backend "moonfx", which torch.compile finds by name, and its options.

torch.compile(model, backend="moonfx", options={"block": 4096, "topk": 12})
torch.compile(muon.step, backend="moonfx")
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from moonfx.backend import step_messages
from moonfx.backend.on_miss import ON_MISS, check_choice, miss
from moonfx.backend.records import Record, records_of_step, remember
from moonfx.backend.rewriter import Backend
from moonfx.capture.dynamo_frames import is_piece
from moonfx.capture.inductor import COMPILERS, mode_options
from moonfx.capture.retrace import held_tensors
from moonfx.capture.symbolic_flags import decide_flags
from moonfx.policy import LayerPolicy, Policies, check_flag, did_you_mean
from moonfx.verdicts import forget, in_short

DEFAULTS: dict[str, Any] = {
    "block": 4096,
    "topk": 12,
    "sinks": 1,
    "causal_only": True,
    "recompute_routing": False,
    "on_miss": "warn",
    "compiler": "inductor",
    "inductor": None,
    "disable_passes": (),
}
FLAGS = ("causal_only", "recompute_routing")
decide_flags()  # the first graph is traced before the backend is called
# The backend is given graphs, not the model: after a graph break it cannot tell layers apart.
OF_SPARSIFY = ("layers", "dense_last")


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """DEFAULTS updated by the user's options.

    Raises:
        ValueError: for an unknown option (listing the known ones) or a bad value.
        TypeError: for a value of the wrong type.
    """
    for name in options or {}:
        if name not in DEFAULTS:
            hint = did_you_mean(name, DEFAULTS)
            if name in OF_SPARSIFY:
                hint = " (policies per layer need the model: moonfx.sparsify takes them)"
            raise ValueError(
                f"unknown option {name!r} of backend 'moonfx'{hint}; known: {', '.join(DEFAULTS)}"
            )
    known = {**DEFAULTS, **(options or {})}
    for flag in FLAGS:
        check_flag(flag, known[flag])
    check_choice("on_miss", known["on_miss"], ON_MISS)
    check_choice("compiler", known["compiler"], COMPILERS)
    if known["inductor"] is not None and not isinstance(known["inductor"], dict):
        raise TypeError(f"inductor must be a dict of Inductor options, got {known['inductor']!r}")
    return known


def compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Entry point of torch.compile(backend="moonfx").

    Past Dynamo's recompile limit a model runs as if it were not compiled, dense, and it is
    torch.compile that says so; under moonfx.sparsify the limit is higher, and an error.

    Args:
        mode: a mode of Inductor, as torch.compile takes it.
        options: block, topk, sinks, causal_only, recompute_routing, on_miss, compiler and
            disable_passes as for moonfx.sparsify; "inductor": a dict of Inductor options. on_miss
            counts for a graph that holds attention, or that is not a piece left by a graph break;
            of an optimizer's step, for one of which no iteration is faster or left by the cost
            model.
    """
    known = check_options(options)
    config = {**mode_options(mode), **(known["inductor"] or {})}
    default = LayerPolicy(known["block"], known["topk"], known["sinks"])
    flags = {flag: known[flag] for flag in FLAGS}
    policies = Policies(default, **flags, disable_passes=known["disable_passes"])
    backend = Backend(policies, known["compiler"], config=config)
    compiled = backend(gm, example_inputs)
    remember(backend.records)
    (record,) = backend.records
    report, what = backend.report, f"{_what(record)} compiled by backend 'moonfx'"
    if (record.of_optimizer or report.iterations) and not (report.rows or report.failures):
        optimizer = record.optimizer and record.optimizer()
        of_step = records_of_step(optimizer) if optimizer else []
        before = [(r.iterations, r.broken) for r in of_step if r is not record]
        inputs = [*example_inputs, *held_tensors(gm).values()]
        problem = step_messages.problem(what, gm, inputs, record.iterations, before)
        if problem is not None:
            if "newton_schulz" in record.disabled:  # then nothing is known of its iterations
                problem = f"{what} runs as it was"
            miss(known["on_miss"], report, what, problem)
    elif record.of_optimizer and not report.rows:
        miss(known["on_miss"], report, what, f"{what} runs as it was")
    elif record.lost:
        miss(known["on_miss"], report, what, in_short(record.lost))
    elif not report.rewritten and (report.rows or report.failures or not is_piece(gm)):
        miss(known["on_miss"], report, what)
    return compiled


compile.reset = forget  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def _what(record: Record) -> str:
    optimizer = record.optimizer and record.optimizer()
    return f"the step of {type(optimizer).__name__}" if optimizer else "a graph"
