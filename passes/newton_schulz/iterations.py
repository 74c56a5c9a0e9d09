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
from moonfx.passes.graph.memory_versions import Memory, Value
from moonfx.passes.graph.nodes import short
from moonfx.passes.newton_schulz.identity import identity
from moonfx.passes.newton_schulz.operators import BUFFERS, read_by
from moonfx.passes.newton_schulz.polynomials import quintic
from moonfx.passes.newton_schulz.steps import Coefficients, Step
from moonfx.passes.newton_schulz.views import VIEWS
from moonfx.site import Declined as Reject

aten = torch.ops.aten

# What the operator takes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Chain:
    """X_0 -> X_k.

    Args:
        source: X_0.
        output: X_k.
        turned: X_k is the transpose of what the steps make of X_0.
        coefficients: of each step.
        body: the nodes that the operator replaces, X_k's among them.
        reject: why it cannot be replaced, None if it can.
        column: X_k lies in memory column by column.
        own: X_k may not be a view of what others lie in, too.
    """

    source: Value
    output: fx.Node
    turned: bool = False
    coefficients: list[Coefficients] = field(default_factory=list)
    body: set[fx.Node] = field(default_factory=set)
    reject: Reject | None = None
    column: bool = False
    own: bool = False

    @property
    def value(self) -> torch.Tensor:
        value: torch.Tensor = self.output.meta["val"]
        return value


def chains(steps: dict[Value, Step], memory: Memory, context: Context) -> list[Chain]:
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
    source: Value, steps: dict[Value, Step], memory: Memory, context: Context
) -> Iterator[Chain]:
    """The iterations that begin with X_0, and whether they may be replaced.

    X_k is what the last step is copied to; or else that copy is another's.
    """
    pairs = (_follow(source, steps, memory, copied) for copied in (True, False))
    for chain, second in zip(*pairs, strict=True):
        for each in (chain, second):
            each.reject = each.reject or _reject(each, memory, context)
        yield second if second.reject is None and chain.reject is not None else chain


@dataclass
class _Way:
    """A chain as far as it was followed, and each of its nodes: the step's number, its words."""

    chain: Chain
    words: dict[fx.Node, tuple[int, set[str]]] = field(default_factory=dict)


def _follow(
    source: Value, steps: dict[Value, Step], memory: Memory, copied: bool
) -> Iterator[Chain]:
    """The chains from one X_0: as many as there are iterations that read it."""
    stack = [(source, _Way(Chain(source, source.node)))]
    while stack:
        value, way = stack.pop()
        step = steps.get(value)
        if step is not None and step.reject is None:
            ways = [_on(way, value, r, steps, memory, copied) for r in _branches(step, memory)]
            stack += reversed(ways)
            continue
        chain = way.chain
        if step is not None:
            chain.reject = step.reject
        else:
            chain.source = _of_rank(chain.value.dim(), steps[source], memory)
            chain.body = set(way.words)
            chain.reject = _escapes(chain, way.words, memory)
        yield chain


def _branches(step: Step, memory: Memory) -> list[dict[Value, tuple[Coefficients, bool]]]:
    """The results of a step, those apart that are made each from X anew."""
    found: dict[fx.Node, dict[Value, tuple[Coefficients, bool]]] = {}
    for result, numbers in step.results.items():
        body = step.body(result, memory) if len(step.results) > 1 else set()
        first = next((node for node in found if node in body), result.node)
        found.setdefault(first, {})[result] = numbers
    return list(found.values())


def _on(
    way: _Way,
    source: Value,
    results: dict[Value, tuple[Coefficients, bool]],
    steps: dict[Value, Step],
    memory: Memory,
    copied: bool,
) -> tuple[Value, _Way]:
    """A way, and one step more."""
    step = replace(steps[source], results=results)
    result = next((v for v in results if v in steps), None)
    result = result or _last(source, step, copied)
    numbers, turn = results[result]
    chain = replace(
        way.chain,
        output=result.node,
        turned=way.chain.turned ^ turn,
        coefficients=[*way.chain.coefficients, numbers],
    )
    words = dict(way.words)
    for node in step.body(result, memory):
        words[node] = len(chain.coefficients), set(step.terms[memory.result(node)])
    return result, _Way(chain, words)


def _last(source: Value, step: Step, copied: bool) -> Value:
    """The result of a last step: X_k as X_0 is, or as near to it as there is one."""
    dims = source.node.meta["val"].dim()

    def unlike(result: Value) -> tuple[bool, bool]:
        return result.node.meta["val"].dim() != dims, step.results[result][1]

    last = min(step.results, key=unlike)
    for copy in step.results if copied else ():
        if copy.node.target is aten.copy_.default and list(last.node.users) == [copy.node]:
            last = copy
    return last


def _of_rank(dims: int, step: Step, memory: Memory) -> Value:
    """X_0, or what it is a view of, with as many dims as X_k if there is one."""
    root = memory.of(step.source.node)
    views = (v for v, terms in step.given.items() if "X" in terms and memory.of(v.node) is root)
    return next((v for v in views if v.node.meta["val"].dim() == dims), step.source)


def _escapes(
    chain: Chain, words: dict[fx.Node, tuple[int, set[str]]], memory: Memory
) -> Reject | None:
    """Why the nodes of a chain are not its own; drops views of X_0 from it that others read."""
    _constants(chain, memory)
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
        return Reject(f"{what} is also {how} by {short(others[0])}", others[0])
    return None


def _constants(chain: Chain, memory: Memory) -> None:
    """Adds what is made for the chain alone: memory to write to, zeros, multiples of the identity.

    Some of it is made of the size of what the chain's nodes make, and could not be without them.
    """
    stack = list(chain.body)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in chain.body or not chain.body.issuperset(node.users):
                continue
            if node.target in BUFFERS or identity(memory.result(node), memory) is not None:
                chain.body.add(node)
                stack.append(node)


def _reject(chain: Chain, memory: Memory, context: Context) -> Reject | None:
    value, x = chain.value, chain.source.node.meta["val"]
    node = chain.output
    if not (is_plain(value) and is_plain(x)):
        return Reject("a tensor subclass", node)
    if x.dim() != value.dim():
        return Reject("X has another number of dims after the last step", node)
    if not all(type(n) is int for n in (*x.shape, *value.shape)):
        return Reject("sizes are not known when the graph is compiled", node)
    if x.dtype not in DTYPES:
        return Reject(f"the operator has no {x.dtype}", node)
    if not x.numel():
        return Reject("a matrix without entries", node)
    if not all(map(math.isfinite, (x for numbers in chain.coefficients for x in numbers))):
        return Reject("a coefficient is infinite or not a number", node)
    if context.gradients.needed(node, memory):
        return Reject("gradients flow through it, and the operator has none", node)
    chain.column = not value.is_contiguous()
    if chain.column and not value.mT.is_contiguous():
        return Reject(f"X lies in memory with strides {tuple(value.stride())}", node)
    by_strides = (n for m in memory.members[memory.of(node)] for n in m.users if _strides(n))
    if (reader := next(by_strides, None)) is not None:
        return Reject(f"{short(reader)} reads memory that X lies in by its strides", reader)
    chain.own = _shows_a_view(chain, memory, context)
    return _writes_for_others(chain, memory)


def _shows_a_view(chain: Chain, memory: Memory, context: Context) -> bool:
    """Whether it is seen that X_k is a view: autograd lets none be written to or detached in place
    that was made without it, or with others."""
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
    return node.op == "call_function" and short(node).startswith(("as_strided", "resize", "set_"))


def _writes_for_others(chain: Chain, memory: Memory) -> Reject | None:
    """Whether someone else reads what the iteration writes in place."""
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
                return Reject("it writes into memory that others see", member)
            others = [n for n in member.users if n not in chain.body and n not in after]
            late = [n for n in others if n.op == "output" or memory.position[n] > since]
            if late:
                return Reject(f"{short(late[0])} reads what it writes in place", late[0])
    return None
