"""What reads a parameter, through views, casts and selections of an expert.

w -> t -> to(bfloat16) -> mm(x, .)       a product with x, in which w's columns are the inputs
w [E, M, N] -> index(experts) -> bmm     a product per expert
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import DIVIDE, MULTIPLY
from moonfx.passes.parameters.dataflow import DataFlow, FlowValue, Worklist
from moonfx.passes.parameters.element_positions import REARRANGE, SAME, replay_on_positions

_MULTIPLIES = MULTIPLY | DIVIDE
GATHERS = {aten.index.Tensor, aten.index_select.default, aten.select.int}
TABLES = {
    aten.embedding.default,
    aten.embedding_bag.padding_idx,
    aten.embedding_bag.default,
    aten._embedding_bag.default,
}


class Use(NamedTuple):
    """One operator that reads a parameter together with something that the model computes.

    Args:
        op: the operator.
        value: what it reads: the parameter, or what is made of it alone.
        at: for each dim of the parameter, which index along it each element of `value` is; None if
            its numbers were changed on the way.
        through: what changed its numbers.
    """

    op: FlowValue
    value: FlowValue
    at: tuple[Tensor, ...] | None
    through: tuple[FlowValue, ...]


class _Made(NamedTuple):
    at: tuple[Tensor, ...] | None
    through: tuple[FlowValue, ...]
    items: Any = None


def uses_of(flow: DataFlow, parameter: FlowValue) -> list[Use]:
    """Every operator where a parameter meets what the model computes, in the order of the run."""
    shape = parameter.shape
    own = tuple(_along(dim, shape) for dim in range(len(shape)))
    made: dict[FlowValue, _Made] = {parameter: _Made(own, ())}
    found: list[Use] = []
    worklist = Worklist(flow, [parameter])
    for value in worklist:
        if value is not parameter:
            ours = [x for x in value.reads if x in made]
            if not ours:
                continue  # a tensor that a part of it was written into
            if value.target in TABLES:
                found += [Use(value, x, made[x].at, made[x].through) for x in ours]
                continue
            if not flow.active(value):
                made[value] = _of_weights(value, ours, made)
            elif (one := _of_an_expert(value, ours, made, shape)) is not None:
                made[value] = one
            else:
                found += [Use(value, x, made[x].at, made[x].through) for x in ours]
                continue
        if value.returned and value is not parameter:
            found.append(Use(value, value, None, ()))
        worklist.add(value.users)
    return found


def _along(dim: int, shape: tuple[int, ...]) -> Tensor:
    sizes = [n if i == dim else 1 for i, n in enumerate(shape)]
    return torch.arange(shape[dim]).view(sizes).expand(shape)


def _of_weights(value: FlowValue, ours: list[FlowValue], made: dict[FlowValue, _Made]) -> _Made:
    """What is made of weights and constants alone: a view if it can be seen as one."""
    first = made[ours[0]]
    if len(ours) == 1 and first.at is not None:
        if value.target in SAME or (value.target in _MULTIPLIES and len(value.reads) == 1):
            return first
        if first.items is not None and isinstance(value.args[1], int):
            return _Made(first.items[value.args[1]], first.through)
        views = [replay_on_positions(value, {ours[0]: at}) for at in first.at]
        if value.target in REARRANGE and all(v is not None for v in views):
            if isinstance(views[0], tuple | list):
                return _Made(first.at, first.through, list(zip(*views, strict=True)))
            return _Made(tuple(views), first.through)
    through = dict.fromkeys(x for y in ours for x in made[y].through)
    return _Made(None, (*through, value))


def _of_an_expert(
    value: FlowValue, ours: list[FlowValue], made: dict[FlowValue, _Made], shape: tuple[int, ...]
) -> _Made | None:
    """A selection of matrices by what the model computes: any of them stands for all."""
    known = made[ours[0]]
    if len(ours) > 1 or value.target not in GATHERS or known.at is None or len(shape) < 3:
        return None
    if value.args[0] is not ours[0] or known.at[0].ndim < 3 or _selected(value) != 0:
        return None
    at = tuple(x.select(0, 0) for x in known.at)
    try:
        return _Made(tuple(x.expand(value.shape) for x in at), known.through)
    except RuntimeError:
        return None


def _selected(value: FlowValue) -> int | None:
    """The one dim that is indexed."""
    if value.target is aten.index.Tensor:
        indices = value.args[1]
        given = [i for i, x in enumerate(indices) if x is not None]
        return given[0] if len(given) == 1 else None
    dim = value.argument(1, "dim")
    return dim if isinstance(dim, int) else None
