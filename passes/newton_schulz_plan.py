"""Which iterations are computed together, and whether the operator is worth its call."""

import math
from collections.abc import Hashable
from typing import Any

from moonfx.ops import newton_schulz as operator
from moonfx.passes.newton_schulz_chain import Chain
from moonfx.passes.newton_schulz_products import ADDING, PRODUCTS

# Of the matrices that one call is given.
CALL_BYTES = 256 << 20


def key(chain: Chain, depth: int, alone: bool) -> Hashable:
    """What iterations must share to be computed by one call.

    Args:
        depth: how many iterations follow one another before it.
        alone: whether its result must have memory of its own.
    """
    value = chain.value
    numbers = tuple(chain.coefficients)
    mine = chain.output if alone else None
    return value.device, value.dtype, shape(chain), numbers, depth, mine


def shape(chain: Chain) -> tuple[int, ...]:
    """Of what the operator is given for it: its rows in memory, X_k's."""
    *batch, m, n = chain.value.shape
    return (*batch, n, m) if chain.column else (*batch, m, n)


def calls(members: list[Chain]) -> list[list[Chain]]:
    """Iterations of one key, shared out so that no call is given more than CALL_BYTES."""
    value = members[0].value
    each = max(1, CALL_BYTES // (value.numel() * value.element_size()))
    return [members[i : i + each] for i in range(0, len(members), each)]


def form_of(members: list[Chain]) -> tuple[str, str]:
    """The form of the operator for one call, "" to leave what was written, and why."""
    value, numbers = members[0].value, members[0].coefficients
    *batch, m, n = value.shape
    count = len(members) * math.prod(batch)
    size = (value.device, value.dtype, count, m, n, len(numbers))
    form, why = operator.newton_schulz_form(*size, numbers)
    if is_as_written(form, members):
        return "", f"plain products, one after another, are what was written ({why})"
    return form, why


def is_as_written(form: str, members: list[Chain]) -> bool:
    """Whether the operator would run the products that the graph has already."""
    return form == "plain" and (members[0].value.device.type == "cpu" or len(members) == 1)


def flops(chain: Chain) -> int:
    """Of the products that were written."""
    total = 0
    for node in chain.body:
        read: Any = node.args
        if node.target in PRODUCTS:
            left = read[1] if node.target in ADDING else read[0]
            total += 2 * node.meta["val"].numel() * left.meta["val"].shape[-1]
    return total
