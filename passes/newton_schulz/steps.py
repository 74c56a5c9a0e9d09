"""Finds Newton-Schulz steps in a graph: X <- a X + (b A + c A^2) X with A = X X^T.

    A = X @ X.T              an anchor: a product of a matrix and its own transpose
    B = b * A + c * A @ A    {"XT": b, "XTXT": c}
    Y = a * X + B @ X        {"X": a, "XTX": b, "XTXTX": c}: a step

From each anchor, follows who reads X and works out what polynomial of X each of them is. What the
step is written with does not matter, only what it computes.
"""

import heapq
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from moonfx.passes.graph.memory_versions import Memory, Value
from moonfx.passes.newton_schulz.gram import gram_source, same_as
from moonfx.passes.newton_schulz.identity import identity
from moonfx.passes.newton_schulz.matmuls import PRODUCTS
from moonfx.passes.newton_schulz.operands import TooLong, Unclear, shape
from moonfx.passes.newton_schulz.operators import is_arithmetic, read_by, terms_of
from moonfx.passes.newton_schulz.polynomials import Terms, quintic, sides, transposed
from moonfx.passes.newton_schulz.views import RESHAPES
from moonfx.site import Declined as Reject

Coefficients = tuple[float, float, float]

# Nodes that are made of products of X, or of what is no polynomial of it, and are looked at before
# a graph is taken to be something else; and of all that read X, multiples of it included.
LIMIT = 256
READERS = 16 * LIMIT


@dataclass
class Step:
    """One step.

    Args:
        source: X.
        given: X, and what it is a view or copy of: {"X": 1.0}, or {"T": 1.0} for its transpose.
        results: the nodes that are a quintic of X, in the graph's order -> its coefficients, and
            whether it is the transpose of one.
        terms: what each node that is a polynomial of X is, by value.
        reject: why it cannot be replaced, None if nothing is known to stand in the way.
    """

    source: Value
    given: dict[Value, Terms]
    results: dict[Value, tuple[Coefficients, bool]] = field(default_factory=dict)
    terms: dict[Value, Terms] = field(default_factory=dict)
    reject: Reject | None = None

    def body(self, result: Value, memory: Memory) -> set[fx.Node]:
        """The nodes between what is given and a result, the result's among them."""
        found: set[fx.Node] = set()
        stack = [result]
        while stack:
            value = stack.pop()
            if value in self.given or value.node in found:
                continue
            found.add(value.node)
            reads = (memory.read(value.node, n) for n in read_by(value.node))
            stack += [v for v in reads if v in self.terms]
        return found


def find_steps(graph: fx.Graph, memory: Memory) -> dict[Value, Step]:
    """All steps of a graph by their X, and what looks like one with the reason why it is none."""
    found: dict[Value, Step] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        source = gram_source(node, memory)
        if source is not None and source not in found:
            step = _step(source, memory)
            if step is not None:
                found[source] = step
    inside = {v for step in found.values() for v in step.terms.keys() - step.given.keys()}
    inside -= {v for step in found.values() for v in step.results}  # A of A A^T, and no X
    return {s: step for s, step in found.items() if step.results or s not in inside}


def _step(source: Value, memory: Memory) -> Step | None:
    given = {v: {"T" if turned else "X": 1.0} for v, turned in same_as(source, memory)}
    step = Step(source, given, terms=dict(given))
    spoiled: dict[Value, Reject] = {}
    beyond: set[Value] = set()  # of a higher degree: what follows the step
    squared = False
    heap: list[tuple[int, fx.Node]] = []
    seen: set[fx.Node] = set()
    followed = 0

    def follow(value: Value) -> None:
        nonlocal followed
        followed += not _is_x(step, value)
        for user in value.node.users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                heapq.heappush(heap, (memory.position[user], user))

    for value in given:
        follow(value)
    while heap and followed < LIMIT and len(seen) < READERS:
        node = heapq.heappop(heap)[1]
        value = memory.result(node)
        reads = [memory.read(node, n) for n in read_by(node)]
        of_x = not step.terms.keys().isdisjoint(reads)
        if value in given or (not of_x and identity(value, memory) is not None):
            continue  # written like X, and not made of it
        bad = next((spoiled[v] for v in reads if v in spoiled), None)
        if beyond.intersection(reads):
            beyond.add(value)
            follow(value)
            continue

        def get(operand: Any, node: fx.Node = node) -> Terms:
            read = memory.read(node, operand)
            if read in step.terms:
                return step.terms[read]
            constant = identity(read, memory)
            return constant if constant is not None else step.terms[read]

        try:
            if bad is not None:
                raise Unclear(bad.reason)
            terms = terms_of(node, get)
            _check(node, terms, [v for v in reads if v in step.terms], source)
        except TooLong:
            if not step.results:
                beyond.add(value)
                follow(value)
            continue
        except (KeyError, Unclear) as why:
            reason = str(why) if isinstance(why, Unclear) else "something else than X comes in"
            if is_arithmetic(node) and not all(_is_x(step, v) for v in reads):
                squared |= node.target in PRODUCTS and not any(_is_x(step, v) for v in reads)
                spoiled[value] = bad or Reject(reason, node)
                follow(value)
            continue
        squared |= "XTXT" in terms or "TXTX" in terms
        step.terms[value] = terms
        for turn, each in ((False, terms), (True, transposed(terms))):
            if (numbers := quintic(each)) is not None:
                step.results[value] = numbers, turn
        follow(value)
    if not step.results and heap and squared:
        step.reject = Reject(f"{len(seen)} nodes read X or what is made of it", heap[0][1])
    elif not step.results:
        step.reject = _why_not(step, list(spoiled.values()), squared)
    return step if step.results or step.reject is not None else None


def _check(node: fx.Node, terms: Terms, reads: list[Value], source: Value) -> None:
    """Checks that a node is as large as what it computes, and of no more matrices than X is.

    The matrices of a batch stay in their order: a view may number them otherwise, and all operands
    of other operators must then number them as it does.
    """
    x, made = shape(source.node), shape(node)
    sizes = {"m": x[-2], "n": x[-1]}
    expected = sides(terms) - {("", "")}
    alike = all([sizes[r], sizes[c]] == made[-2:] for r, c in expected)
    views = node.target in RESHAPES
    if not alike or not (views or all(_batch(v.node) == _batch(node) for v in reads)):
        raise Unclear("a matrix is broadcast or reshaped inside the step")


def _batch(node: fx.Node) -> list[Any]:
    """The sizes of a batch, without leading 1s."""
    sizes: list[Any] = shape(node)[:-2]
    while sizes and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def _is_x(step: Step, value: Value) -> bool:
    return set(step.terms.get(value, {"": 0.0})) <= {"X", "T"}


def _why_not(step: Step, spoiled: list[Reject], squared: bool) -> Reject | None:
    """Why something that looks like a step is none; None if it does not look like one."""
    node = step.source.node
    odd = [{w for w, x in terms.items() if x != 0.0} for terms in step.terms.values()]
    cubic = any({"X", "XTX"} == words or {"T", "TXT"} == words for words in odd)
    if spoiled and squared:
        return spoiled[0]
    if squared and any({"X", "XTXTX"} == words or {"T", "TXTXT"} == words for words in odd):
        return Reject("a step without the term b A X", node)
    if cubic and (not squared or _in_full(step)):
        return Reject("a cubic step: the operator's has A^2", node)
    if squared:
        return Reject("a X + (b A + c A^2) X is not formed of A = X X^T", node)
    return None


def _in_full(step: Step) -> bool:
    """Whether all three terms of a step are written, some with a coefficient of 0."""
    whole = ({"X", "XTX", "XTXTX"}, {"T", "TXT", "TXTXT"})
    return any(set(terms) in whole for terms in step.terms.values())
