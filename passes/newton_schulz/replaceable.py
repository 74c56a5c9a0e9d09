"""Proves that an iteration X_0 -> X_k may be replaced by the operator.

It may if nothing but X_k is read by anyone else, nothing is written to memory that anyone else
sees, no gradient flows through it, and X is a plain tensor of known size.
"""

import math

import torch
from torch import fx

from moonfx.capture.sizes import is_plain
from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import Memory
from moonfx.passes.graph.nodes import operator_name
from moonfx.passes.newton_schulz.chain import Chain, Partial
from moonfx.passes.newton_schulz.identity import identity
from moonfx.passes.newton_schulz.operators import BUFFERS, read_by
from moonfx.passes.newton_schulz.polynomials import quintic
from moonfx.passes.newton_schulz.views import VIEWS
from moonfx.site import Declined

aten = torch.ops.aten

# The dtypes that the operator has.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_own(partial: Partial, memory: Memory) -> None:
    """Checks that nobody else reads the nodes of a chain; drops views of X_0 that others read.

    Raises:
        Declined: naming who does, or why the chain leads no further.
    """
    if partial.rejected is not None:
        raise partial.rejected
    chain, words = partial.chain, partial.words
    _add_constants(chain, memory)
    for node in sorted(words, key=memory.position.__getitem__, reverse=True):
        number, made = words[node]
        read = node is not chain.output and not chain.body.issuperset(node.users)
        if read and made <= {"X", "T"} and node.target in VIEWS and number == 1:
            chain.body.discard(node)
    for node in sorted(chain.body & set(words), key=memory.position.__getitem__):
        others = [user for user in node.users if user not in chain.body]
        if not others or node is chain.output:
            continue
        number, made = words[node]
        if quintic(dict.fromkeys(made, 1.0)):
            what = f"X after step {number}"
        else:
            what = f"{'A = X X^T' if made <= {'XT', 'TX'} else 'a value'} of step {number}"
        written = node in memory.writes(others[0]) and node not in read_by(others[0])
        how = "written to" if written else "read"
        raise Declined(f"{what} is also {how} by {operator_name(others[0])}", others[0])


def _add_constants(chain: Chain, memory: Memory) -> None:
    """Adds what is made for the chain alone: memory to write to, zeros, multiples of the identity.

    Some of it has the size of what the chain's nodes make (empty_like), and so must go with them.
    """
    stack = list(chain.body)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in chain.body or not chain.body.issuperset(node.users):
                continue
            if node.target in BUFFERS or identity(memory.result(node), memory) is not None:
                chain.body.add(node)
                stack.append(node)


def check_replaceable(chain: Chain, memory: Memory, context: Context) -> None:
    """Checks that the operator computes what a chain does, and that nobody can tell; sets how X_k
    must lie in memory.

    Raises:
        Declined: naming what stands in the way.
    """
    value, x = chain.value, chain.source.node.meta["val"]
    node = chain.output
    if not (is_plain(value) and is_plain(x)):
        raise Declined("a tensor subclass", node)
    if x.dim() != value.dim():
        raise Declined("X has another number of dims after the last step", node)
    if not all(type(n) is int for n in (*x.shape, *value.shape)):
        raise Declined("sizes are not known when the graph is compiled", node)
    if x.dtype not in DTYPES:
        raise Declined(f"the operator has no {x.dtype}", node)
    if not x.numel():
        raise Declined("a matrix without entries", node)
    if not all(map(math.isfinite, (x for numbers in chain.coefficients for x in numbers))):
        raise Declined("a coefficient is infinite or not a number", node)
    if context.gradients.needed(node, memory):
        raise Declined("gradients flow through it, and the operator has none", node)
    chain.column = not value.is_contiguous()
    if chain.column and not value.mT.is_contiguous():
        raise Declined(f"X lies in memory with strides {tuple(value.stride())}", node)
    by_strides = (n for m in memory.members[memory.of(node)] for n in m.users if _strides(n))
    if (reader := next(by_strides, None)) is not None:
        raise Declined(
            f"{operator_name(reader)} reads memory that X lies in by its strides", reader
        )
    chain.own = _shows_a_view(chain, memory, context)
    _check_writes(chain, memory)


def _shows_a_view(chain: Chain, memory: Memory, context: Context) -> bool:
    """Whether a program can tell that X_k is a view.

    Autograd lets no view be written to or detached in place that was made without gradients, or
    together with other views.
    """
    if memory.is_returned(chain.output):
        return True
    for name in memory.members[memory.of(chain.output)]:
        for user in name.users.keys() - chain.body:
            written = name in memory.writes(user) and context.mode(user).gradients
            if written or memory.is_shared(name) or user.target is aten.detach_.default:
                return True
    return False


def _strides(node: fx.Node) -> bool:
    """Whether a node may read more of a tensor's memory than the tensor itself."""
    names = ("as_strided", "resize", "set_")
    return node.op == "call_function" and operator_name(node).startswith(names)


def _check_writes(chain: Chain, memory: Memory) -> None:
    """Checks that nobody else reads what the iteration writes in place.

    Raises:
        Declined: naming who does.
    """
    first: dict[fx.Node, int] = {}
    for node in sorted(chain.body, key=memory.position.__getitem__):
        for target in memory.writes(node):
            first.setdefault(memory.of(target), memory.position[node])
    for root, since in first.items():
        after: set[fx.Node] = {chain.output}
        for member in memory.members[root]:
            if after.intersection(memory.aliases(member)):
                after.add(member)
        for member in memory.members[root]:
            if member in chain.body or member in after:
                continue
            if member.op in ("placeholder", "get_attr") or memory.is_shared(member):
                raise Declined("it writes into memory that others see", member)
            others = [n for n in member.users if n not in chain.body and n not in after]
            late = [n for n in others if n.op == "output" or memory.position[n] > since]
            if late:
                raise Declined(f"{operator_name(late[0])} reads what it writes in place", late[0])
