"""What is checked at each call of a compiled graph: the values that its proofs rest on.

Dynamo guards a tensor's shape, not its values. A version counter makes the check free while a
tensor stays as it is; a write through `.data` does not count, to this check as to autograd.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from moonfx.passes.symbolic.input_masks import Given, Packed, packed_values_of, values_of
from moonfx.passes.symbolic.reader import summary

# A buffer's values, or those of a mask that came into the graph.
Values = tuple[float, float] | Given

OTHER_MASK = (
    "a mask that comes into the graph is not the causal one that it was compiled for, so this call "
    "ran as it was written, dense and not compiled"
)


def checked(
    compiled: Callable[..., Any],
    guards: dict[int, Values],
    dense: Callable[..., Any],
    note: Callable[[str], None],
) -> Callable[..., Any]:
    """Runs `compiled` where every guarded input holds what was proved of it.

    Args:
        compiled: the rewritten graph.
        guards: position of an input -> its values.
        dense: the same graph as it was written, run for any other mask.
        note: told when that happens.
    Returns:
        A callable that raises RuntimeError if a buffer has changed.
    """

    def run(*args: Any) -> Any:
        for position, values in guards.items():
            if _found(args[position], type(values)) == values:
                continue
            if not isinstance(values, Given):
                raise RuntimeError(
                    "a buffer that was proved to hold a causal mask has changed since the model "
                    f"was compiled (graph input {position}); call moonfx.sparsify again"
                )
            note(OTHER_MASK)
            warnings.warn(f"moonfx: {OTHER_MASK}", RuntimeWarning, stacklevel=2)
            return dense(*args)
        return compiled(*args)

    return run


# The layers of a model share a few masks: (tensor, version, kind of values, values), latest last.
_latest: deque[tuple[weakref.ref[torch.Tensor], int, type, Values | None]] = deque(maxlen=32)


_READS: dict[type, Callable[[torch.Tensor], Values | None]] = {
    Given: values_of,
    Packed: packed_values_of,
}


def _found(tensor: torch.Tensor, kind: type) -> Values | None:
    """The values of a tensor, read anew only if it may have changed."""
    version = -1 if tensor.is_inference() else tensor._version
    for known, then, of, values in reversed(_latest):
        if known() is tensor and then == version >= 0 and of is kind:
            return values
    read: Callable[[torch.Tensor], Values | None] = _READS.get(kind, summary)
    values = read(tensor)
    _latest.append((weakref.ref(tensor), version, kind, values))
    return values
