"""Checks that key^T was made from keys [.., N, D], features last."""

import torch
from torch import fx

from moonfx.passes.graph.nodes import permutation
from moonfx.passes.graph.operators import CASTS, COPIES, DIVIDE, MULTIPLY
from moonfx.site import Declined

aten = torch.ops.aten


def check_token_major(key: fx.Node) -> None:
    """Checks that key^T was made from keys [.., N, D], features last.

    The composed permutation of key^T must put a source dim before the feature dim last; without a
    transpose the product could be query @ weights of the same shape by coincidence of sizes.

    Raises:
        Declined: if it does not.
    """
    rank = len(key.meta["val"].shape)
    order, node = list(range(rank)), key
    while True:
        step = permutation(node)
        if step is not None:
            order = [step[d] for d in order]
        elif node.target not in CASTS | COPIES | MULTIPLY | DIVIDE:
            break
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        same = [a for a in operands if len(a.meta["val"].shape) == rank]
        if len(same) != 1 and step is None and node.target in MULTIPLY | DIVIDE:
            break
        node = same[0]
    if order[-1] > order[-2]:
        unproved = "the keys are not transposed: their last dim is not proved to be tokens"
        raise Declined(unproved, key)
