"""Which iterations are computed together, and whether the operator is worth its call."""

import math
from collections.abc import Hashable

import torch

from moonfx.ops import newton_schulz as operator
from moonfx.passes.newton_schulz import matmuls as newton_schulz_products
from moonfx.passes.newton_schulz.iterations import Chain

# Of the matrices that one call is given. What is alive for it is three times as much at most: they,
# what it makes, and what it needs on the way.
CALL_BYTES = 256 << 20
# Where matrices that lie by rows and by columns have calls of their own, and above which size
# everywhere. To turn them costs a copy in and one out: on a CPU under Inductor four and four of
# 256 x 1024 took 1.13x as long in one call as in two, of 576 x 1536 1.03x (bfloat16, one thread).
# And Inductor takes what is turned on its way into a stack to need no memory: it makes all such
# stacks at once, and none is freed before its call. A GPU is filled by one call of small matrices.
LAYOUTS_APART = {"cpu"}
TURNED_BYTES = 2 << 20


def key(chain: Chain, depth: int, alone: bool) -> Hashable:
    """What iterations must share to be computed by one call.

    Args:
        depth: how many iterations follow one another before it.
        alone: whether its result must have memory of its own.
    """
    value = chain.value
    numbers = tuple(chain.coefficients)
    mine = chain.output if alone else None
    lies = sides(chain)
    if not _apart(value):
        lies = min(lies), max(lies)
    return value.device, value.dtype, lies, numbers, depth, mine


def turns(chain: Chain) -> bool:
    """Whether the operator is given the transpose of X_0.

    Where layouts are apart, X_0 is read as it lies. Elsewhere X_k is written as it lay.
    """
    x = chain.source.node.meta["val"]
    if _apart(x):
        return not x.is_contiguous() and x.mT.is_contiguous()
    return chain.turned ^ chain.column


def _apart(x: torch.Tensor) -> bool:
    return x.device.type in LAYOUTS_APART or x.numel() * x.element_size() > TURNED_BYTES


def sides(chain: Chain) -> tuple[int, int]:
    """Of what the operator is given."""
    m, n = chain.source.node.meta["val"].shape[-2:]
    return (n, m) if turns(chain) else (m, n)


def common_sides(members: list[Chain]) -> tuple[int, int]:
    """Of what the operator is given for them: as they lie, or the short side first."""
    first = sides(members[0])
    return first if all(sides(chain) == first for chain in members) else (min(first), max(first))


def calls(members: list[Chain]) -> list[list[Chain]]:
    """Iterations of one key, shared out so that no call is given more than CALL_BYTES."""
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
    """Of the products that were written."""
    return sum(map(newton_schulz_products.flops, chain.body))
