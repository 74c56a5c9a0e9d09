"""A tensor that is made empty and then filled: which tensors became which of its features.

key = k.new_empty(B, H, N, C + R)
key[..., :C].copy_(k)
key[..., C:].copy_(k_rot.expand(..))        key is what cat([k, k_rot], -1) is
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import aliases, writes
from moonfx.passes.graph.nodes import argument, shape
from moonfx.passes.graph.operators import SLICES

aten = torch.ops.aten

_EMPTY = {
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
    aten.zeros.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
}


def filled_with(node: fx.Node, context: Context) -> list[fx.Node]:
    """What is copied into a tensor's slices of features; none if that is not all that is done to it
    before anything reads it."""
    if node.target not in _EMPTY or not context.mutated(node):
        return []
    last = context.writes(node.graph)[node]
    found: list[fx.Node] = []
    views = [node]
    while views:
        view = views.pop()
        for user in view.users:
            if view in writes(user):
                source: Any = argument(user, 1, "src")
                if user.target is not aten.copy_.default or not _of_last_dim(view, node):
                    return []
                found.append(source)
                views += [user] if user.users else []
            elif view in aliases(user):
                views.append(user)
            elif user < last:
                return []
    return found


def _of_last_dim(view: fx.Node, base: fx.Node) -> bool:
    """Whether a view is the tensor itself, or a slice of its features."""
    while view is not base:
        source: Any = view.args[0]
        if view.target is aten.copy_.default:
            view = source
            continue
        rank = len(shape(source))
        dim = argument(view, 1, "dim", 0) % rank
        whole = shape(view) == shape(source)
        if view.target not in SLICES or not (dim == rank - 1 or whole):
            return False
        view = source
    return True
