"""What a compiled optimizer's step that nothing was made faster in should tell its owner."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from moonfx.capture.dynamo_frames import (
    graph_breaks,
    is_called_by_broken_step,
    is_last_piece_of_step,
    is_piece,
)
from moonfx.report.newton_schulz import IterationRow

NONE = (
    "{what} holds no Newton-Schulz iteration, and of an optimizer nothing else is made faster: "
    "leave it to another backend, or set on_miss='ignore'"
)
DECLINED = "no Newton-Schulz iteration of {what} is proved: {reason} ({line}){hint}"
# The beginning of a reason -> what its reader can do.
HINTS = {
    "sizes are not known": (
        "; torch.compile(..., dynamic=False) makes a graph for each size, and a step without "
        "graph breaks is one graph with all sizes"
    ),
    "gradients flow": "; decorate the step with torch.no_grad()",
    "a X + (b A + c A^2) X is not formed": (
        "; an iteration on A itself, the Gram form, is another algorithm and stays as it was"
    ),
}
DISTRIBUTED = (
    "{what} holds no Newton-Schulz iteration of plain tensors: its parameters are sharded or "
    "replicated over devices (DTensor, {how}), and what runs on DTensors stays as it was. An "
    "optimizer that gathers whole matrices and iterates on those (full_tensor(), or to_local() "
    "where they are replicated) is made faster"
)
BROKEN = (
    "{what} came in pieces, and none holds a Newton-Schulz iteration; it was broken at {breaks}. "
    "What stands between the pieces ran as it was, or on the backend of a torch.compile of its "
    "own: mend the breaks"
)
SKIPPED = (
    "; if it was, Dynamo left it out, as it may leave out a step with a graph break, and what is "
    "under a torch.compile of its own ran on that one's backend. "
    "Dynamo's graph breaks so far, whose places TORCH_LOGS=graph_breaks prints: {breaks}"
)


def problem(
    what: str,
    gm: fx.GraphModule,
    inputs: Iterable[Any],
    rows: Sequence[IterationRow],
    before: Sequence[tuple[Sequence[IterationRow], str | None]],
) -> str | None:
    """What to say of one graph of an optimizer's step, None if there is nothing to say.

    Args:
        what: the step, in words.
        gm: its graph as Dynamo gave it.
        inputs: the tensors that it is given or holds.
        rows: its iterations.
        before: of each graph of the same step compiled before it: its iterations, and where and why
            it was broken off.
    """
    if rows:
        first = rows[0]
        if any(row.action != "declined" for row in rows):
            return None
        hint = next((HINTS[why] for why in HINTS if first.reason.startswith(why)), "")
        return DECLINED.format(what=what, reason=first.reason, line=first.line, hint=hint)
    how = placements(inputs)
    if how is not None:
        return DISTRIBUTED.format(what=what, how=how)
    if not is_piece(gm) and not is_called_by_broken_step():
        return NONE.format(what=what)
    if is_last_piece_of_step(gm) and not any(rows for rows, _ in before):
        breaks = dict.fromkeys(broken for _, broken in before if broken)
        return BROKEN.format(what=what, breaks="; ".join(breaks))
    return None


def placements(tensors: Iterable[Any]) -> str | None:
    """How the first DTensor lies on its devices, None if there is none."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    for tensor in tensors:
        if isinstance(tensor, DTensor):
            return ", ".join(map(str, tensor.placements))
    return None


def skipped() -> str:
    """What may have happened to a step that no graph is known of."""
    breaks = graph_breaks()
    return SKIPPED.format(breaks="; ".join(breaks)) if breaks else ""
