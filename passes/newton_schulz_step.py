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

import torch
from torch import fx

from moonfx.passes.memory import Memory, Value
from moonfx.passes.newton_schulz_nodes import (
    ADDING,
    CASTS,
    PRODUCTS,
    TABLE,
    TURNS,
    TooLong,
    Unclear,
    read_by,
    terms_of,
)
from moonfx.passes.newton_schulz_terms import Terms, quintic, sides, transposed
from moonfx.passes.nodes import short
from moonfx.site import Reject

aten = torch.ops.aten

Coefficients = tuple[float, float, float]

# Nodes that read X and are looked at before a graph is taken to be something else.
LIMIT = 256


@dataclass
class Step:
    """One step.

    Args:
        source: X.
        results: the nodes that are a quintic of X, in the graph's order -> its coefficients, and
            whether it is the transpose of one.
        terms: what each node that is a polynomial of X is, by value.
        reject: why it cannot be replaced, None if nothing is known to stand in the way.
    """

    source: Value
    results: dict[Value, tuple[Coefficients, bool]] = field(default_factory=dict)
    terms: dict[Value, Terms] = field(default_factory=dict)
    reject: Reject | None = None

    def body(self, result: Value, memory: Memory) -> set[fx.Node]:
        """The nodes between X and a result, the result's among them and X's not."""
        found: set[fx.Node] = set()
        stack = [result.node]
        while stack:
            node = stack.pop()
            if node in found or node is self.source.node:
                continue
            found.add(node)
            reads = [memory.read(node, n) for n in read_by(node)]
            stack += [v.node for v in reads if v in self.terms and v.node not in found]
        return found


def gram_source(node: fx.Node, memory: Memory) -> Value | None:
    """X of a node X X^T or X^T X, else None."""
    if node.target is aten.linear.default:
        left, right = (memory.read(node, n) for n in node.args[:2])  # type: ignore[arg-type]
        return left if left == right and is_matrix(left, memory) else None
    operands: Any = node.args[:2]
    if node.target is aten.einsum.default:
        operands = node.args[1]
    elif node.target in ADDING:
        operands = node.args[1:3]
    elif node.target not in PRODUCTS:
        return None
    if len(operands) != 2 or not all(isinstance(n, fx.Node) for n in operands):
        return None
    left, right = (memory.read(node, n) for n in operands)
    found = None
    if left in (turned(right, memory), right if node.target is aten.einsum.default else None):
        found = left
    elif turned(left, memory) == right:
        found = right
    return found if found is not None and is_matrix(found, memory) else None


def turned(value: Value, memory: Memory) -> Value | None:
    """What a value is the transpose of, None if it is not written as one."""
    if value.node.target not in TURNS or memory.result(value.node) != value:
        return None
    return memory.read(value.node, value.node.args[0])  # type: ignore[arg-type]


def is_matrix(value: Value, memory: Memory) -> bool:
    """Whether a value is a floating point matrix or a batch of them, as its node made it."""
    tensor = value.node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return False
    return tensor.dtype.is_floating_point and memory.result(value.node) == value


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
    return found


def _step(source: Value, memory: Memory) -> Step | None:
    step = Step(source, terms={source: {"X": 1.0}})
    base = turned(source, memory)
    if base is not None and base == memory.result(base.node):
        step.terms[base] = {"T": 1.0}
    shape = source.node.meta["val"].shape
    spoiled: dict[Value, Reject] = {}
    beyond: set[Value] = set()  # of a higher degree: what follows the step
    squared = False
    heap: list[tuple[int, fx.Node]] = []
    seen: set[fx.Node] = set()

    def follow(value: Value) -> None:
        for user in value.node.users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                heapq.heappush(heap, (memory.position[user], user))

    for value in list(step.terms):
        follow(value)
    while heap and len(seen) < LIMIT:
        node = heapq.heappop(heap)[1]
        if node is source.node or _identity(memory.result(node), memory) is not None:
            continue  # written like X, and not made of it
        reads = [memory.read(node, n) for n in read_by(node)]
        bad = next((spoiled[v] for v in reads if v in spoiled), None)
        value = memory.result(node)
        if beyond.intersection(reads):
            beyond.add(value)
            follow(value)
            continue

        def get(operand: Any, node: fx.Node = node) -> Terms:
            read = memory.read(node, operand)
            return step.terms.get(read) or _identity(read, memory) or step.terms[read]

        try:
            if bad is not None:
                raise Unclear(bad.reason)
            terms = terms_of(node, get)
            if not _fits(terms, node.meta["val"].shape, shape):
                raise Unclear("a matrix is broadcast or reshaped inside the step")
        except TooLong:
            if not step.results:
                beyond.add(value)
                follow(value)
            continue
        except (KeyError, Unclear) as why:
            reason = str(why) if isinstance(why, Unclear) else "something else than X comes in"
            if _matters(node, step, reads):
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
    if not step.results:
        step.reject = _why_not(step, list(spoiled.values()), squared)
    return step if step.results or step.reject is not None else None


def _identity(value: Value, memory: Memory) -> Terms | None:
    """The polynomial of a multiple of the identity matrix, None for anything else."""
    node = value.node
    if node.op != "call_function" or memory.result(node) != value:
        return None
    if node.target is aten.eye.default:
        return {"": 1.0}
    if node.target in CASTS:  # of ones and zeros: exact in any dtype
        exact = _identity(memory.read(node, node.args[0]), memory)  # type: ignore[arg-type]
        return exact if exact == {"": 1.0} else None
    if node.target not in TABLE or len(read_by(node)) != 1:
        return None
    (operand,) = read_by(node)
    if node.meta["val"].shape[-2:] != operand.meta["val"].shape[-2:]:
        return None  # a view of its entries as other matrices, or one of them repeated

    def get(operand: Any) -> Terms:
        found = _identity(memory.read(node, operand), memory)
        if found is None:
            raise KeyError("not made of the identity")
        return found

    try:
        return terms_of(node, get)
    except (KeyError, TooLong, Unclear):
        return None


def _fits(terms: Terms, shape: torch.Size, of_x: torch.Size) -> bool:
    """Whether a polynomial of X has the shape that its words say."""
    sizes = {"m": of_x[-2], "n": of_x[-1], "": shape[-1]}
    batched = tuple(shape[:-2]) == tuple(of_x[:-2])
    expected = sides(terms) - {("", "")}
    return batched and all((sizes[r], sizes[c]) == tuple(shape[-2:]) for r, c in expected)


# Operators that a step holds by mistake or for a purpose of its own; all others say that the graph
# is something else.
_ARITHMETIC = {str(target).split(".")[1].rstrip("_") for target in TABLE} | {
    *("addcmul", "addcdiv", "where", "dropout", "native_dropout", "pow", "sqrt", "clamp", "tanh"),
    *("round", "dot", "bernoulli", "sign"),
}


def _matters(node: fx.Node, step: Step, reads: list[Value]) -> bool:
    """Whether a node that is no polynomial may be part of a step: arithmetic on more than X."""
    return short(node).rstrip("_") in _ARITHMETIC and not all(_is_x(step, v) for v in reads)


def _is_x(step: Step, value: Value) -> bool:
    return set(step.terms.get(value, {"": 0.0})) <= {"X", "T"}


def _why_not(step: Step, spoiled: list[Reject], squared: bool) -> Reject | None:
    """Why something that looks like a step is none; None if it does not look like one."""
    node = step.source.node
    odd = [set(terms) for terms in step.terms.values()]
    if spoiled and squared:
        return spoiled[0]
    if squared and any({"X", "XTXTX"} == words or {"T", "TXTXT"} == words for words in odd):
        return Reject("a step without the term b A X", node)
    if squared:
        return Reject("a X + (b A + c A^2) X is not formed of A = X X^T", node)
    if any({"X", "XTX"} == words or {"T", "TXT"} == words for words in odd):
        return Reject("a cubic step: the operator's has A^2", node)
    return None
