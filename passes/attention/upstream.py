"""What lies above the scores: constants, and whether a product of query and key does."""

import sympy
import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.operators import DISTANCES, FAR, PRODUCTS, SCORES_PASS


def constant_of(value: object, context: Context) -> float | None:
    """A scalar that the graph itself fixes, or the one value of all of a tensor, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        rank = len(held.shape) if isinstance(held, torch.Tensor) else 0
        index = [sympy.Dummy(integer=True, nonnegative=True) for _ in range(rank)]
        found = context.reader.broadcast(value, index)
        if getattr(found, "is_number", False) and found.is_extended_real:
            return float(found)
    return None


def is_scalar(value: fx.Node) -> bool:
    """A tensor or a symbolic number that holds one value for all heads and positions."""
    held = value.meta.get("val")
    return held.dim() == 0 if isinstance(held, torch.Tensor) else held is not None


def reaches_product(node: object) -> bool:
    """Whether a node is made of query @ key^T by elementwise operators."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, list | tuple):
            stack.extend(node)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS and len(node.meta["val"].shape) >= 3:
            return True
        if node.target in SCORES_PASS:
            stack.extend(node.args)
    return False


def product_above(start: fx.Node) -> fx.Node | None:
    """A product or a distance of tensors anywhere near above the softmax."""
    upstream = [start]
    seen: set[fx.Node] = set()
    while upstream:
        current = upstream.pop()
        if current in seen or len(seen) > FAR:
            continue
        seen.add(current)
        if current.target in PRODUCTS | DISTANCES:
            return current
        upstream.extend(current.all_input_nodes)
    return None
