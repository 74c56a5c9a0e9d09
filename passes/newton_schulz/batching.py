"""Which iterations are computed together, and whether the operator is worth its call."""

import math
from collections.abc import Hashable

import torch

from moonfx.ops import newton_schulz as operator
from moonfx.passes.newton_schulz import matmuls
from moonfx.passes.newton_schulz.iterations import Chain

# The most that one call is given. Three times as much is alive for it at most: its operand, its
# result, and what it needs on the way.
CALL_BYTES = 256 << 20
# On these devices, wide and tall matrices have calls of their own; elsewhere from this size on. To
# transpose them costs a copy in and one out: on a CPU under Inductor four and four of 256 x 1024
# took 1.13x as long in one call as in two, of 576 x 1536 1.03x (bfloat16, one thread). And Inductor
# counts no memory for what is transposed on its way into a stack: it makes all such stacks at once,
# and frees none before its call. A GPU is filled by one call of small matrices.
SEPARATE_LAYOUTS = {"cpu"}
TRANSPOSED_BYTES = 2 << 20


def key(chain: Chain, depth: int, alone: bool) -> Hashable:
    """What iterations must share to be computed by one call.

    Args:
        depth: how many iterations follow one another before it.
        alone: whether its result must have memory of its own.
    """
    value = chain.value
    m, n = sides(chain)
    if not _keeps_layout(value):
        m, n = min(m, n), max(m, n)
    own = chain.output if alone else None
    return value.device, value.dtype, m, n, tuple(chain.coefficients), depth, own


def is_transposed(chain: Chain) -> bool:
    """Whether the operator is given the transpose of X_0.

    Where layouts have calls of their own, X_0 is read in its own layout. Elsewhere X_k is written
    in its own.
    """
    x = chain.source.node.meta["val"]
    if _keeps_layout(x):
        return not x.is_contiguous() and x.mT.is_contiguous()
    return chain.transposed ^ chain.column


def _keeps_layout(x: torch.Tensor) -> bool:
    """Whether matrices like this share a call only with those of the same layout."""
    separate = x.device.type in SEPARATE_LAYOUTS
    return separate or x.numel() * x.element_size() > TRANSPOSED_BYTES


def sides(chain: Chain) -> tuple[int, int]:
    """The sizes (m, n) of the matrices that the operator is given for an iteration of its own."""
    m, n = chain.source.node.meta["val"].shape[-2:]
    return (n, m) if is_transposed(chain) else (m, n)


def common_sides(members: list[Chain]) -> tuple[int, int]:
    """The sizes (m, n) of the matrices that one call is given for all of these iterations.

    They are the members' own where these agree, else the short side comes first.
    """
    first = sides(members[0])
    return first if all(sides(chain) == first for chain in members) else (min(first), max(first))


def calls(members: list[Chain]) -> list[list[Chain]]:
    """Iterations of one key, divided so that no call of several is given more than CALL_BYTES."""
    found: list[list[Chain]] = []
    room = 0
    for chain in members:
        size = chain.value.numel() * chain.value.element_size()
        if size > room:
            found.append([])
            room = CALL_BYTES
        found[-1].append(chain)
        room -= size
    return found


def form_of(members: list[Chain]) -> tuple[str, str]:
    """The form of the operator for one call, "" to leave what was written, and why."""
    value, numbers = members[0].value, members[0].coefficients
    m, n = value.shape[-2:]
    count = sum(math.prod(chain.value.shape[:-2]) for chain in members)
    size = (value.device, value.dtype, count, m, n, len(numbers))
    form, why = operator.newton_schulz_form(*size, numbers, len(members))
    if is_as_written(form, members):
        return "", f"plain products, one after another, are what was written ({why})"
    return form, why


def is_as_written(form: str, members: list[Chain]) -> bool:
    """Whether the operator would run the products that the graph has already."""
    return form == "plain" and (members[0].value.device.type == "cpu" or len(members) == 1)


def flops(chain: Chain) -> int:
    """The FLOPs of the products as they were written."""
    return sum(map(matmuls.flops, chain.body))
