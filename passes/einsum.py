"""Reads an einsum as the matrix product that it is.

    before  einsum("bihd,bjhd->bhij", q [B, Nq, H, D], k [B, Nk, H, D])
    after   matmul(permute(q, "bhid"), permute(k, "bhdj"))        scores [B, H, Nq, Nk]

    before  einsum("bhij,bjhd->bihd", p [B, H, Nq, Nk], v [B, Nk, H, D])
    after   permute(matmul(p, permute(v, "bhjd")), "bihd")

Only products of two operands over one shared letter, with every other letter kept: each letter at
most once in each place, so that nothing is summed away or taken from a diagonal.
"""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def subscripts(node: fx.Node) -> tuple[str, str, str] | None:
    """(left, right, result) letters of a two-operand einsum that is a matrix product, else None."""
    if node.target is not aten.einsum.default or len(node.args) < 2 or node.kwargs.get("path"):
        return None
    equation, given = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, result = equation.partition("->")
    left, comma, right = inputs.partition(",")
    if not (arrow and comma and isinstance(given, list | tuple) and len(given) == 2):
        return None
    if "." in equation or any(len(set(part)) != len(part) for part in (left, right, result)):
        return None
    summed = set(left) & set(right) - set(result)
    one_sided = set(left) ^ set(right)
    if len(summed) != 1 or not one_sided <= set(result) or not set(result) <= set(left + right):
        return None
    free_left, free_right = set(left) - set(right), set(right) - set(left)
    return (left, right, result) if len(free_left) == len(free_right) == 1 else None


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors of an einsum that `subscripts` reads."""
    first, second = node.args[1]  # type: ignore[misc, str-unpack]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return first, second


def as_scores(node: fx.Node) -> fx.Node | None:
    """An equal matmul for an einsum with the keys last in its result; replaces the node."""
    parts = subscripts(node)
    if parts is None:
        return None
    left, right, result = parts
    (summed,) = set(left) & set(right) - set(result)
    query, key = operands(node)
    if set(right) != set(result[:-2]) | {result[-1], summed}:
        if set(left) != set(result[:-2]) | {result[-1], summed}:
            return None
        left, right, query, key = right, left, key, query
    if result[-2] not in left:
        return None
    with node.graph.inserting_before(node):
        query = _permuted(query, left, result[:-2] + result[-2] + summed, node)
        key = _permuted(key, right, result[:-2] + result[-1] + summed, node)
        key = _made(aten.transpose.int, (key, -2, -1), node)
        product = _made(aten.matmul.default, (query, key), node)
    return _replace(node, product)


def as_output(node: fx.Node, probabilities: fx.Node) -> fx.Node | None:
    """An equal matmul(probabilities, values), up to a permutation; replaces the einsum."""
    parts = subscripts(node)
    if parts is None:
        return None
    left, right, result = parts
    first, second = operands(node)
    if first is not probabilities:
        left, right, first, second = right, left, second, first
    (summed,) = set(left) & set(right) - set(result)
    (feature,) = set(right) - set(left)
    if first is not probabilities or second is probabilities or left[-1] != summed:
        return None
    batch = left[:-2]
    if left[-2] in right:
        return None
    with node.graph.inserting_before(node):
        value = _permuted(second, right, batch + summed + feature, node)
        product = _made(aten.matmul.default, (probabilities, value), node)
        output = _permuted(product, left[:-1] + feature, result, node)
    _replace(node, output)
    return product


def _permuted(operand: fx.Node, given: str, wanted: str, like: fx.Node) -> fx.Node:
    if given == wanted:
        return operand
    return _made(aten.permute.default, (operand, [given.index(x) for x in wanted]), like)


def _made(target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    node = like.graph.call_function(target, args)
    node.meta.update(
        {k: like.meta[k] for k in ("stack_trace", "nn_module_stack") if k in like.meta}
    )
    with torch.no_grad():
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _replace(node: fx.Node, by: fx.Node) -> fx.Node:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    return by
