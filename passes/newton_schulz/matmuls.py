"""What a product of matrices makes of polynomials in X: every operator that multiplies matrices.

An einsum's equation is read as a chain of products: in "ij,kj,kl->il" the operands lead from i to l
by way of j and k, the second of them backwards, and so it is P Q^T R.
"""

import math
from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import argument
from moonfx.passes.newton_schulz.operands import (
    GetTerms,
    TermRule,
    Unclear,
    alike,
    number,
    overloads,
    shape,
    times,
)
from moonfx.passes.newton_schulz.polynomials import Terms, plus, scaled, transposed

aten = torch.ops.aten


def _matmul(node: fx.Node, get: GetTerms) -> Terms:
    return times(get(node.args[0]), get(node.args[1]))


def _linear(node: fx.Node, get: GetTerms) -> Terms:
    if argument(node, 2, "bias") is not None:
        raise Unclear("a bias is added to a product")
    return times(get(node.args[0]), transposed(get(node.args[1])))


def _inner(node: fx.Node, get: GetTerms) -> Terms:
    if any(len(shape(n)) != 2 for n in node.args[:2]):  # type: ignore[arg-type]
        raise Unclear("products of each matrix of a batch with each")
    return times(get(node.args[0]), transposed(get(node.args[1])))


def _tensordot(node: fx.Node, get: GetTerms) -> Terms:
    if any(len(shape(n)) != 2 for n in node.args[:2]):  # type: ignore[arg-type]
        raise Unclear("products of each matrix of a batch with each")
    ours, theirs = (argument(node, i, k) for i, k in ((2, "dims_self"), (3, "dims_other")))
    if len(ours) != 1 or len(theirs) != 1:
        raise Unclear("a sum over both dims of a matrix")
    left, right = get(node.args[0]), get(node.args[1])
    left = left if ours[0] % 2 == 1 else transposed(left)
    return times(left, right if theirs[0] % 2 == 0 else transposed(right))


def _addmm(node: fx.Node, get: GetTerms) -> Terms:
    beta, alpha = (number(argument(node, i, k, 1)) for i, k in ((3, "beta"), (4, "alpha")))
    out = scaled(times(get(node.args[1]), get(node.args[2])), alpha)
    if not beta:
        return out
    alike(node, node.args[0])
    return plus(scaled(get(node.args[0]), beta), out)


def _power(node: fx.Node, get: GetTerms) -> Terms:
    base, n = get(node.args[0]), argument(node, 1, "n")
    if n != 2:
        raise Unclear(f"a matrix power of {n}")
    return times(base, base)


def _multi_dot(node: fx.Node, get: GetTerms) -> Terms:
    matrices: Any = node.args[0]
    if any(len(shape(each)) != 2 for each in matrices):
        raise Unclear("a vector is multiplied inside the step")
    out = get(matrices[0])
    for each in matrices[1:]:
        out = times(out, get(each))
    return out


def _einsum(node: fx.Node, get: GetTerms) -> Terms:
    equation, operands = str(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    order = einsum_chain(equation)
    if order is None or len(order) != len(operands):
        raise Unclear(f"the sums of einsum {equation!r} are not one product of matrices")
    out: Terms = {"": 1.0}
    for position, backwards in order:
        each = get(operands[position])
        out = times(out, transposed(each) if backwards else each)
    return out


def einsum_chain(equation: str) -> list[tuple[int, bool]] | None:
    """The operands of an einsum as one product, in their order, each with whether it is transposed.

    None if the equation is not one product of matrices.
    """
    given, arrow, out = equation.replace(" ", "").replace("...", ".").partition("->")
    words = given.split(",")
    if not arrow:
        letters = "".join(words).replace(".", "")
        out = "." * ("." in given) + "".join(sorted(x for x in letters if letters.count(x) == 1))
    lead, ends = out[:-2], [w[-2:] for w in (*words, out)]
    if any(w[:-2] != lead or len(set(w)) != len(w) for w in (*words, out)):
        return None
    letters = "".join(ends)
    if any(len(w) != 2 or "." in w for w in ends) or set(lead) & set(letters):
        return None
    if any(letters.count(x) != 2 for x in letters):
        return None
    at, found = out[-2], []
    left = dict(enumerate(ends[:-1]))
    while left:
        position = next((i for i, word in left.items() if at in word), None)
        if position is None:
            return None
        word = left.pop(position)
        found.append((position, word[1] == at))
        at = word[0] if word[1] == at else word[1]
    return found if at == out[-1] else None


def flops(node: fx.Node) -> int:
    """The FLOPs of the products that a node makes, from left to right where they are several."""
    given = _factors(node)
    rows = given[0][0] if given else 0
    return sum(2 * math.prod(shape(node)[:-2]) * rows * k * n for k, n in given[1:])


def _factors(node: fx.Node) -> list[tuple[int, int]]:
    """Rows and columns of the matrices that a node multiplies, in their order."""
    operands: Any = node.args
    if node.target in ADDING:
        operands = operands[1:]
    elif node.target in _POWERS:
        return [tuple(shape(operands[0])[-2:])] * 2
    elif node.target in _OF_LISTS:
        return [tuple(shape(each)[-2:]) for each in operands[0]]
    elif node.target in _EINSUMS:
        order = einsum_chain(operands[0]) or []
        sizes = [(shape(operands[1][i])[-2:], backwards) for i, backwards in order]
        return [(n, m) if backwards else (m, n) for (m, n), backwards in sizes]
    elif node.target not in PRODUCTS and node.target not in _TENSORDOTS:
        return []
    left, right = (tuple(shape(each)[-2:]) for each in operands[:2])
    if node.target in _TENSORDOTS:
        left = left if operands[2][0] % 2 else left[::-1]
    return [left, right if right[0] == left[1] and right[1] == shape(node)[-1] else right[::-1]]


ADDING = overloads("addmm.default baddbmm.default", _addmm)
PRODUCTS = {
    **ADDING,
    **overloads("matmul.default mm.default bmm.default", _matmul),
    **overloads("linear.default", _linear),
    **overloads("inner.default", _inner),
}
_TENSORDOTS = overloads("tensordot.default", _tensordot)
_POWERS = overloads("matrix_power.default linalg_matrix_power.default", _power)
_OF_LISTS = overloads("linalg_multi_dot.default chain_matmul.default", _multi_dot)
_EINSUMS = overloads("einsum.default", _einsum)
RULES: dict[Any, TermRule] = {**PRODUCTS, **_TENSORDOTS, **_POWERS, **_OF_LISTS, **_EINSUMS}
