"""What is said of a sparsified model's call once it has run, as `on_miss` asks.

The first call must make something sparse. A later one must not lose what was sparse: not by a graph
in which it is declined, and not because no graph of ours runs there any more.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moonfx.backend.on_miss import NothingRewritten, miss
from moonfx.backend.records import Record
from moonfx.backend.runs import graphs_that_ran
from moonfx.capture.plain_attention import UNKNOWN, PlainAttention, Watch
from moonfx.model_state import State, restore
from moonfx.report.attention import Row, kind_of_call
from moonfx.verdicts import in_short

NOTHING_COMPILED = "nothing of {what} was compiled, and it runs dense: {reason}"
LEFT_OUT = (
    "it, or what calls it, is under torch.compiler.disable, torch.vmap or another transform of "
    "torch.func, or a dispatch mode"
)
NOTHING_RAN = (
    "no compiled graph of {what} ran in this call, which is dense; in earlier calls some did. "
    "Dynamo gave its code up, or was told to stay out (torch.compiler.set_stance, disable)"
)


def judged(
    model: torch.nn.Module, compiled: Callable[..., Any], state: State
) -> Callable[..., Any]:
    """Runs the compiled call, and says after it what there is to say."""

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        with graphs_that_ran() as ran, Watch(model, late=not state.watch_next) as watch:
            result = compiled(*args, **kwargs)
        _judge(model, state, ran, watch)
        return result

    return run


def _judge(model: torch.nn.Module, state: State, ran: Sequence[Record], watch: Watch) -> None:
    what = type(model).__name__
    new = state.backend.records[state.judged :]
    first = not state.called
    state.called, state.judged = True, len(state.backend.records)
    path = frozenset(map(id, ran))
    if watch.on:
        state.paths[path] = _found_outside(state, watch.seen.values())
    # What runs in pieces may run in other pieces next time, and nothing be compiled for it.
    state.in_pieces |= len(ran) != 1
    state.watch_next = state.in_pieces or path not in state.paths
    if first:
        _judge_first(model, state, new, list(watch.seen.values()))
        return
    lost = [str(each) for record in dict.fromkeys(ran) for each in record.lost]
    lost += state.paths.get(path, [])
    if not ran and not lost:
        lost.append(NOTHING_RAN.format(what=what))
    report = state.backend.report_on(new or dict.fromkeys(ran))
    if lost:
        miss(state.on_miss, report, what, in_short(lost))
    elif _failed(new) or (report.declined and not report.rewritten and new):
        miss(state.on_miss, report, what, f"a new kind of call of {what} is dense")


def _failed(records: Iterable[Record]) -> bool:
    """Whether a graph runs as it was as a whole, so that nothing is known of its attentions."""
    return any(record.failure and not record.rows for record in records)


def _found_outside(state: State, seen: Iterable[PlainAttention]) -> list[str]:
    """Puts attentions outside of every graph into the report; says which of them were sparse.

    Those that never were sparse are in the report as any declined attention is.
    """
    sparse = {layer: verdict for (layer, _), verdict in state.backend.verdicts.sparse().items()}
    lost = []
    for each in seen:
        state.backend.outside[each.layer, each.line] = _row(each)
        if each.layer in sparse:
            lost.append(
                f"{each.layer or '(root)'} was sparse in {sparse[each.layer].call} and runs "
                f"outside of every compiled graph, dense, in this one ({each.line}): {each.reason}"
            )
    return lost


def _judge_first(
    model: torch.nn.Module,
    state: State,
    new: Sequence[Record],
    outside: Sequence[PlainAttention],
) -> None:
    """Something must have become sparse; else the model is as before, where that is an error."""
    what, report = type(model).__name__, state.backend.report_on(new)
    try:
        if not new:
            known = (each.reason for each in outside if each.reason != UNKNOWN)
            problem = NOTHING_COMPILED.format(what=what, reason=next(known, LEFT_OUT))
            miss(state.on_miss, report, what, problem)
        elif not report.rewritten:
            miss(state.on_miss, report, what)
        elif unused := state.backend.unused():
            problem = f"no attention of {what} fits layers[{', '.join(unused)}]"
            miss(state.on_miss, report, what, problem)
    except NothingRewritten:
        restore(model)
        raise


def _row(found: PlainAttention) -> Row:
    """An attention that runs outside of every compiled graph."""
    return Row(
        layer=found.layer or "(root)",
        line=found.line,
        form=found.form,
        mask="",
        modifiers="",
        heads=None,
        kv_heads=None,
        head_dim=None,
        action="declined",
        block=None,
        topk=None,
        sinks=None,
        reason=f"runs outside of every compiled graph: {found.reason}",
        queries=found.queries,
        keys=found.keys,
        calls=kind_of_call(found.queries, found.keys),
    )
