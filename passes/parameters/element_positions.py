"""Which element of a tensor each element of a view of it is.

    y [2, 8, 48]        positions along the last dim         0 1 2 ... 47
    y.view(2, 8, 4, 12).chunk(3, -1)[0]                      0 1 2 3   12 13 14 15   24 ...

Found by running the operators themselves on integer tensors that are expanded from one row, so
that every spelling of a view is exact and nothing is computed twice for each token.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moonfx.passes.graph.operators import CASTS, COPIES, DROPOUT, VIEWS
from moonfx.passes.parameters.dataflow import LIKE_ANOTHER, FlowValue

aten = torch.ops.aten

# Rearrange a tensor, or take a part of it, and compute nothing.
REARRANGE = VIEWS | {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.permute.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
    aten.adjoint.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.broadcast_to.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.index_select.default,
    aten.index.Tensor,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.unbind.int,
    operator.getitem,
}
# The same numbers at the same places.
SAME = CASTS | COPIES | DROPOUT | {aten.detach.default, aten.lift_fresh_copy.default}

# May copy their tensor, which is small while it is expanded from one row.
_COPY = {
    aten.reshape.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.repeat.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.flip.default,
    aten.roll.default,
    aten.cat.default,
    aten.stack.default,
}
MOST = 2**26


def is_pointwise(value: FlowValue) -> bool:
    """Whether each element of the result is made of the elements at its place, broadcast."""
    tags = getattr(value.target, "tags", ())
    return torch.Tag.pointwise in tags or value.target in SAME


def by_channel(value: FlowValue) -> bool:
    """Whether it is a convolution of each channel by itself, in one dimension."""
    if value.target not in (aten.conv1d.default, aten.conv1d.padding) or len(value.args) < 7:
        return False
    read, weight = value.args[:2]
    return bool(value.args[6] == read.shape[1] == weight.shape[0])


def leaves_of(args: Any) -> list[Tensor]:
    """The tensors among some arguments."""
    if isinstance(args, Tensor):
        return [args]
    return [x for y in args for x in leaves_of(y)] if isinstance(args, list) else []


def replay_on_positions(value: FlowValue, known: dict[FlowValue, Any]) -> Any:
    """A rearrangement run on positions instead of numbers, None if that cannot be done.

    Args:
        known: positions by the values that have them.
    """

    class Unknown(Exception):
        pass

    def given(x: Any) -> Any:
        if isinstance(x, FlowValue):
            if x in known:
                return known[x]
            if (constant := constant_of(x)) is not None:
                return constant
            raise Unknown
        if isinstance(x, tuple | list):
            return [given(y) for y in x]
        return x

    try:
        numbers = value.args
        if value.target in LIKE_ANOTHER:
            numbers = (value.args[0], torch.zeros(()).expand(value.args[1].shape))
        args = [given(x) for x in numbers]
        kwargs = {k: given(x) for k, x in value.kwargs.items()}
        target: Callable[..., Any] = value.target
        if value.target in _COPY and any(x.numel() > MOST for x in leaves_of(args)):
            return None
        return target(*args, **kwargs)
    except (Unknown, RuntimeError, IndexError, TypeError, ValueError):
        return None  # a size that only the run knows, or an index that does


def constant_of(value: FlowValue) -> Tensor | None:
    """The numbers of a constant tensor, through its copies."""
    while value.target in SAME and value.reads:
        value = value.reads[0]
    return value.known


def distinct(positions: Tensor) -> Tensor:
    """The positions in a tensor, each once, ascending."""
    return _narrowed(positions).unique()


def alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    few, others = _narrowed(a), _narrowed(b)
    return torch.equal(few, others) if few.shape == others.shape else torch.equal(a, b)


def _narrowed(positions: Tensor) -> Tensor:
    """One element of each dim that is expanded."""
    for dim, stride in enumerate(positions.stride()):
        if stride == 0 and positions.shape[dim] > 1:
            positions = positions.narrow(dim, 0, 1)
    return positions
