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

from moonfx.passes.graph.memory_versions import Memory, TensorVersion
from moonfx.passes.graph.walks import reachable
from moonfx.passes.newton_schulz.gram import gram_source, same_as
from moonfx.passes.newton_schulz.identity import identity
from moonfx.passes.newton_schulz.matmuls import PRODUCTS
from moonfx.passes.newton_schulz.operands import TooLong, Unclear, shape
from moonfx.passes.newton_schulz.operators import is_arithmetic, read_by, terms_of
from moonfx.passes.newton_schulz.polynomials import Terms, quintic, sides, transposed
from moonfx.passes.newton_schulz.views import RESHAPES
from moonfx.site import Declined

Coefficients = tuple[float, float, float]

# After so many nodes that are made of products of X, or of what is no polynomial of it, a graph is
# taken to be something else; and after so many that read X or a multiple of it.
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

    source: TensorVersion
    given: dict[TensorVersion, Terms]
    results: dict[TensorVersion, tuple[Coefficients, bool]] = field(default_factory=dict)
    terms: dict[TensorVersion, Terms] = field(default_factory=dict)
    reject: Declined | None = None

    def body(self, result: TensorVersion, memory: Memory) -> set[fx.Node]:
        """The nodes between what is given and a result, the result's among them."""

        def reads(value: TensorVersion) -> list[TensorVersion]:
            operands = (memory.read(value.node, n) for n in read_by(value.node))
            return [v for v in operands if v in self.terms]

        between = reachable([result], reads, self.given.__contains__)
        return {value.node for value in between}


def find_steps(graph: fx.Graph, memory: Memory) -> dict[TensorVersion, Step]:
    """All steps of a graph by their X, and what looks like one with the reason why it is none."""
    found: dict[TensorVersion, Step] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        source = gram_source(node, memory)
        if source is not None and source not in found:
            step = _Search(source, memory).run()
            if step is not None:
                found[source] = step
    inside = {v for step in found.values() for v in step.terms.keys() - step.given.keys()}
    inside -= {v for step in found.values() for v in step.results}  # A of A A^T, and no X
    return {s: step for s, step in found.items() if step.results or s not in inside}


class _Search:
    """Looks at all that reads X, in the graph's order, for a step."""

    def __init__(self, source: TensorVersion, memory: Memory) -> None:
        self.source, self.memory = source, memory
        self.given = {v: {"T" if t else "X": 1.0} for v, t in same_as(source, memory)}
        self.step = Step(source, self.given, terms=dict(self.given))
        # What is no polynomial of X, or made of such -> why.
        self.spoiled: dict[TensorVersion, Declined] = {}
        # Of a higher degree than a step: what follows it.
        self.beyond: set[TensorVersion] = set()
        self.squared = False
        self.heap: list[tuple[int, fx.Node]] = []
        self.seen: set[fx.Node] = set()
        self.followed = 0

    def run(self) -> Step | None:
        """The step; None where the graph does not look like one."""
        for value in self.given:
            self._follow(value)
        while self.heap and self.followed < LIMIT and len(self.seen) < READERS:
            self._look_at(heapq.heappop(self.heap)[1])
        step = self.step
        if step.results:
            return step
        if self.heap and self.squared:
            why = f"{len(self.seen)} nodes read X or what is made of it"
            step.reject = Declined(why, self.heap[0][1])
        else:
            step.reject = _why_not(step, list(self.spoiled.values()), self.squared)
        return step if step.reject is not None else None

    def _follow(self, value: TensorVersion) -> None:
        """Has the readers of a value looked at."""
        self.followed += not self._is_x(value)
        for user in value.node.users:
            if user not in self.seen and user.op == "call_function":
                self.seen.add(user)
                heapq.heappush(self.heap, (self.memory.position[user], user))

    def _look_at(self, node: fx.Node) -> None:
        value = self.memory.result(node)
        reads = [self.memory.read(node, n) for n in read_by(node)]
        of_x = [v for v in reads if v in self.step.terms]
        if value in self.given or (not of_x and identity(value, self.memory) is not None):
            return  # written like X, and not made of it
        if self.beyond.intersection(reads):
            self.beyond.add(value)
            self._follow(value)
            return
        bad = next((self.spoiled[v] for v in reads if v in self.spoiled), None)
        try:
            if bad is not None:
                raise Unclear(bad.reason)
            terms = terms_of(node, lambda operand: self._terms_of_operand(node, operand))
            _check(node, terms, of_x, self.source)
        except TooLong:
            if not self.step.results:
                self.beyond.add(value)
                self._follow(value)
        except (KeyError, Unclear) as why:
            reason = str(why) if isinstance(why, Unclear) else "something else than X comes in"
            self._spoil(value, reads, bad or Declined(reason, node))
        else:
            self._keep(value, terms)

    def _terms_of_operand(self, node: fx.Node, operand: Any) -> Terms:
        """The polynomial that an operand of a node is.

        Raises:
            KeyError: if it is none.
        """
        read = self.memory.read(node, operand)
        known = self.step.terms.get(read)
        known = identity(read, self.memory) if known is None else known
        if known is None:
            raise KeyError(read)
        return known

    def _spoil(self, value: TensorVersion, reads: list[TensorVersion], why: Declined) -> None:
        """Follows what is no polynomial, where it may be what keeps a step from being one."""
        if is_arithmetic(value.node) and not all(map(self._is_x, reads)):
            self.squared |= value.node.target in PRODUCTS and not any(map(self._is_x, reads))
            self.spoiled[value] = why
            self._follow(value)

    def _keep(self, value: TensorVersion, terms: Terms) -> None:
        self.squared |= "XTXT" in terms or "TXTX" in terms
        self.step.terms[value] = terms
        for is_transposed, each in ((False, terms), (True, transposed(terms))):
            if (numbers := quintic(each)) is not None:
                self.step.results[value] = numbers, is_transposed
        self._follow(value)

    def _is_x(self, value: TensorVersion) -> bool:
        return set(self.step.terms.get(value, {"": 0.0})) <= {"X", "T"}


def _check(node: fx.Node, terms: Terms, reads: list[TensorVersion], source: TensorVersion) -> None:
    """Checks that a node is as large as what it computes, and of no more matrices than X is.

    The matrices of a batch stay in their order. A view may number them otherwise; all operands of
    other operators must number them as their result does.
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


def _why_not(step: Step, spoiled: list[Declined], squared: bool) -> Declined | None:
    """Why something that looks like a step is none; None if it does not look like one.

    Args:
        spoiled: why values that are made of X are no polynomials of it.
        squared: whether A = X X^T, or what may stand for it, is multiplied by itself.
    """
    node = step.source.node
    odd = [{w for w, x in terms.items() if x != 0.0} for terms in step.terms.values()]
    cubic = any({"X", "XTX"} == words or {"T", "TXT"} == words for words in odd)
    if spoiled and squared:
        return spoiled[0]
    if squared and any({"X", "XTXTX"} == words or {"T", "TXTXT"} == words for words in odd):
        return Declined("a step without the term b A X", node)
    if cubic and (not squared or _in_full(step)):
        return Declined("a cubic step: the operator's has A^2", node)
    if squared:
        return Declined("a X + (b A + c A^2) X is not formed of A = X X^T", node)
    return None


def _in_full(step: Step) -> bool:
    """Whether all three terms of a step are written, some with a coefficient of 0."""
    all_three = ({"X", "XTX", "XTXTX"}, {"T", "TXT", "TXTXT"})
    return any(set(terms) in all_three for terms in step.terms.values())
