"""Joins steps to the iterations X_0 -> X_k that they make, and proves what may be replaced.

An iteration may be replaced if nothing but X_k is read by anyone else, nothing is written to memory
that anyone else sees, no gradient flows through it, and X is a plain tensor of known size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from moonfx.capture.sizes import is_plain
from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import Memory, TensorVersion
from moonfx.passes.graph.nodes import operator_name
from moonfx.passes.newton_schulz.identity import identity
from moonfx.passes.newton_schulz.operators import BUFFERS, read_by
from moonfx.passes.newton_schulz.polynomials import quintic
from moonfx.passes.newton_schulz.steps import Coefficients, Step
from moonfx.passes.newton_schulz.views import VIEWS
from moonfx.site import Declined

aten = torch.ops.aten

# The dtypes that the operator has.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Chain:
    """X_0 -> X_k.

    Args:
        source: X_0.
        output: X_k.
        transposed: X_k is the transpose of what the steps make of X_0.
        coefficients: of each step.
        body: the nodes that the operator replaces, X_k's among them.
        reject: why it cannot be replaced, None if it can.
        column: X_k lies in memory column by column.
        own: X_k must not be a view of memory that others lie in, too.
    """

    source: TensorVersion
    output: fx.Node
    transposed: bool = False
    coefficients: list[Coefficients] = field(default_factory=list)
    body: set[fx.Node] = field(default_factory=set)
    reject: Declined | None = None
    column: bool = False
    own: bool = False

    @property
    def value(self) -> torch.Tensor:
        value: torch.Tensor = self.output.meta["val"]
        return value


def chains(steps: dict[TensorVersion, Step], memory: Memory, context: Context) -> list[Chain]:
    """The longest iterations that the steps make, each with the reason why it is not replaced."""
    later = {value for step in steps.values() for value in step.results}
    found: list[Chain] = []
    for source in steps:
        if source not in later:
            found += _proved(source, steps, memory, context)
    return _distinct(found)


def _distinct(found: list[Chain]) -> list[Chain]:
    """One of each: X_0 and a copy of it may both be where one iteration is found to begin."""
    owner: dict[fx.Node, Chain] = {}
    kept = []
    for chain in sorted(found, key=lambda each: (each.reject is not None, -len(each.body))):
        others = [owner[node] for node in (*chain.body, chain.output) if node in owner]
        if any(o.reject is None or o.output is chain.output for o in others):
            continue
        owner |= dict.fromkeys((*chain.body, chain.output), chain)
        kept.append(chain)
    return [chain for chain in found if any(chain is each for each in kept)]


def _proved(
    source: TensorVersion, steps: dict[TensorVersion, Step], memory: Memory, context: Context
) -> Iterator[Chain]:
    """The iterations that begin with X_0, and whether they may be replaced.

    X_k is what the last step is copied to; or else that copy is another's.
    """
    pairs = (_followed(source, steps, memory, copied) for copied in (True, False))
    for partials in zip(*pairs, strict=True):
        for partial in partials:
            try:
                _check_own(partial, memory)
                _check_replaceable(partial.chain, memory, context)
            except Declined as reject:
                # Without its traceback, which holds on to the graph.
                partial.chain.reject = reject.with_traceback(None)
        chain, second = (partial.chain for partial in partials)
        yield second if second.reject is None and chain.reject is not None else chain


@dataclass
class _Partial:
    """A chain as far as it was followed.

    Args:
        words: each of its nodes -> the step's number, and the words of the node's polynomial.
        rejected: why it leads no further, None where it ends.
    """

    chain: Chain
    words: dict[fx.Node, tuple[int, set[str]]] = field(default_factory=dict)
    rejected: Declined | None = None


def _followed(
    source: TensorVersion, steps: dict[TensorVersion, Step], memory: Memory, copied: bool
) -> Iterator[_Partial]:
    """The chains from one X_0: as many as there are iterations that read it."""
    stack = [(source, _Partial(Chain(source, source.node)))]
    while stack:
        value, partial = stack.pop()
        step = steps.get(value)
        if step is None:
            partial.chain.source = _of_rank(partial.chain.value.dim(), steps[source], memory)
            partial.chain.body = set(partial.words)
            yield partial
        elif step.reject is not None:
            yield replace(partial, rejected=step.reject)
        else:
            branches = _branches(step, memory)
            longer = [_extended(partial, value, r, steps, memory, copied) for r in branches]
            stack += reversed(longer)


def _branches(step: Step, memory: Memory) -> list[dict[TensorVersion, tuple[Coefficients, bool]]]:
    """The results of a step, in groups: those of one group are made of the group's first."""
    found: dict[fx.Node, dict[TensorVersion, tuple[Coefficients, bool]]] = {}
    for result, numbers in step.results.items():
        body = step.body(result, memory) if len(step.results) > 1 else set()
        first = next((node for node in found if node in body), result.node)
        found.setdefault(first, {})[result] = numbers
    return list(found.values())


def _extended(
    partial: _Partial,
    source: TensorVersion,
    results: dict[TensorVersion, tuple[Coefficients, bool]],
    steps: dict[TensorVersion, Step],
    memory: Memory,
    copied: bool,
) -> tuple[TensorVersion, _Partial]:
    """A chain and one step more, and the X that it leads to."""
    step = replace(steps[source], results=results)
    result = next((v for v in results if v in steps), None)
    result = result or _last(source, step, copied)
    numbers, is_transposed = results[result]
    chain = replace(
        partial.chain,
        output=result.node,
        transposed=partial.chain.transposed ^ is_transposed,
        coefficients=[*partial.chain.coefficients, numbers],
    )
    words = dict(partial.words)
    for node in step.body(result, memory):
        words[node] = len(chain.coefficients), set(step.terms[memory.result(node)])
    return result, _Partial(chain, words)


def _last(source: TensorVersion, step: Step, copied: bool) -> TensorVersion:
    """The result of a last step that is most like X_0: of as many dims, and not transposed."""
    dims = source.node.meta["val"].dim()

    def unlike(result: TensorVersion) -> tuple[bool, bool]:
        return result.node.meta["val"].dim() != dims, step.results[result][1]

    last = min(step.results, key=unlike)
    for copy in step.results if copied else ():
        if copy.node.target is aten.copy_.default and list(last.node.users) == [copy.node]:
            last = copy
    return last


def _of_rank(dims: int, step: Step, memory: Memory) -> TensorVersion:
    """X_0, or what it is a view of, with as many dims as X_k if there is one."""
    root = memory.of(step.source.node)
    views = (v for v, terms in step.given.items() if "X" in terms and memory.of(v.node) is root)
    return next((v for v in views if v.node.meta["val"].dim() == dims), step.source)


def _check_own(partial: _Partial, memory: Memory) -> None:
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


def _check_replaceable(chain: Chain, memory: Memory, context: Context) -> None:
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
