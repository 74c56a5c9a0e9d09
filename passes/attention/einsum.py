"""Reads an einsum as the matrix product that it is.

    before  einsum("bihd,bjhd->bhij", q [B, Nq, H, D], k [B, Nk, H, D])
    after   matmul(permute(q, "bhid"), permute(k, "bhdj"))        scores [B, H, Nq, Nk]

    before  einsum("bhij,bjhd->bihd", p [B, H, Nq, Nk], v [B, Nk, H, D])
    after   permute(matmul(p, permute(v, "bhjd")), "bihd")

    before  einsum("bghid,bgjd->bghij", q, k)                     keys shared by the group h
    after   matmul(q, unsqueeze(permute(k, "bgdj"), 2))

Only products of two operands over one shared letter, with every other letter kept: each letter at
most once in each place, so that nothing is summed away or taken from a diagonal. Dots stand for
letters of their own.
"""

import string
from dataclasses import dataclass

import torch
from torch import fx

from moonfx.passes.graph.nodes import insert, operator_name

aten = torch.ops.aten

_WRITTEN_AS = "moonfx_written_as"


@dataclass(frozen=True)
class Contraction:
    """A two-operand einsum over one letter.

    Args:
        left, right, result: the letters of the operands and of the result.
        summed: the letter that both operands have and the result has not.
    """

    first: fx.Node
    second: fx.Node
    left: str
    right: str
    result: str
    summed: str

    def swapped(self) -> "Contraction":
        return Contraction(self.second, self.first, self.right, self.left, self.result, self.summed)


def read(node: fx.Node) -> Contraction | None:
    """An einsum as the matrix product that it is, else None."""
    if node.target is not aten.einsum.default or len(node.args) < 2 or node.kwargs.get("path"):
        return None
    equation, given = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, result = equation.partition("->")
    left, comma, right = inputs.partition(",")
    if not (arrow and comma and isinstance(given, list | tuple) and len(given) == 2):
        return None
    first, second = given
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    unused = [x for x in string.ascii_letters if x not in equation]
    hidden = [_hidden(first, left), _hidden(second, right)]
    dots = "".join(unused[: max(hidden)])
    left, right = (
        part.replace("...", dots[len(dots) - count :])
        for part, count in zip((left, right), hidden, strict=True)
    )
    result = result.replace("...", dots)
    if any("." in part or len(set(part)) != len(part) for part in (left, right, result)):
        return None
    summed = set(left) & set(right) - set(result)
    one_sided = set(left) ^ set(right)
    if len(summed) != 1 or not one_sided <= set(result) or not set(result) <= set(left + right):
        return None
    return Contraction(first, second, left, right, result, summed.pop())


def _hidden(operand: fx.Node, part: str) -> int:
    """How many dims the dots of an operand's letters stand for."""
    rank = len(operand.meta["val"].shape)
    return rank - len(part.replace("...", "")) if "..." in part else 0


def as_scores(node: fx.Node) -> fx.Node | None:
    """An equal matmul for an einsum with the keys last in its result; replaces the node."""
    found = read(node)
    if found is None or len(found.result) < 3:
        return None
    queries, keys = found.result[-2], found.result[-1]
    if keys not in found.right:
        found = found.swapped()
    if set(found.right) - set(found.left) != {keys} or queries in found.right:
        return None
    batch = found.result[:-2]
    query = _laid_out(found.first, found.left, batch, queries + found.summed, node)
    key = _laid_out(found.second, found.right, batch, keys + found.summed, node)
    key = insert(aten.transpose.int, (key, -2, -1), node)
    product = insert(aten.matmul.default, (query, key), node)
    product.meta[_WRITTEN_AS] = operator_name(node)
    return _replace(node, product)


def written_as(product: fx.Node) -> str:
    """The operator's name for a product of scores, as the graph had it: "einsum", "matmul"."""
    return str(product.meta.get(_WRITTEN_AS, operator_name(product)))


def contracts_keys(node: fx.Node, probabilities: fx.Node) -> bool:
    """Whether an einsum sums over the last dim of one of its operands, the probabilities."""
    found = read(node)
    if found is None:
        return False
    sides = ((found.first, found.left), (found.second, found.right))
    return any(n is probabilities and part[-1] == found.summed for n, part in sides)


def as_output(node: fx.Node, probabilities: fx.Node) -> fx.Node | None:
    """An equal matmul(probabilities, values), up to a permutation; replaces the einsum."""
    found = read(node)
    if found is None:
        return None
    if found.first is not probabilities:
        found = found.swapped()
    feature = set(found.right) - set(found.left)
    if found.first is not probabilities or found.second is probabilities or len(feature) != 1:
        return None
    batch, queries = found.left[:-2], found.left[-2]
    if found.left[-1] != found.summed or queries in found.right:
        return None
    last = feature.pop()
    value = _laid_out(found.second, found.right, batch, found.summed + last, node)
    product = insert(aten.matmul.default, (probabilities, value), node)
    _replace(node, _permuted(product, found.left[:-1] + last, found.result, node))
    return product


def _laid_out(operand: fx.Node, given: str, batch: str, last: str, like: fx.Node) -> fx.Node:
    """The operand as [*batch, *last], with 1 for each letter of the batch that it has not."""
    had = "".join(x for x in batch if x in given)
    operand = _permuted(operand, given, had + last, like)
    for dim, letter in enumerate(batch):
        if letter not in given:
            operand = insert(aten.unsqueeze.default, (operand, dim), like)
    return operand


def _permuted(operand: fx.Node, given: str, wanted: str, like: fx.Node) -> fx.Node:
    if given == wanted:
        return operand
    order = [given.index(x) for x in wanted]
    return insert(aten.permute.default, (operand, order), like)


def _replace(node: fx.Node, by: fx.Node) -> fx.Node:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    return by
