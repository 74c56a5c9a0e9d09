"""Graphs of several iterations, and what is measured of them."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from moonfx.passes.graph.memory_versions import Memory
from tests.support.newton_schulz.cases import Rewritten
from tests.support.newton_schulz.forms import CHANGING

Program = Callable[..., list[Tensor]]


def iterate(X: Tensor, coefficients: tuple[tuple[float, float, float], ...] = CHANGING) -> Tensor:
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def pairs(given: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Parameters and gradients, given in turn."""
    return list(zip(given[::2], given[1::2], strict=True))


def assert_computes_the_same(
    program: Program,
    rewritten: Rewritten,
    given: list[Tensor],
    *,
    gradients: bool = False,
    tolerance: float = 2e-4,
) -> None:
    """Results, what is written, the numbers drawn, and who needs a gradient.

    Args:
        gradients: run with gradients on, and with parameters that need one.
        tolerance: of iterations that are rounded at other places; it grows from one to the next.
    """
    found: list[list[Tensor]] = []
    for run in (program, rewritten):
        copies = [x.clone() for x in given]
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            for parameter in copies[::2]:
                parameter.requires_grad_(gradients)
            out = [*run(*copies), *copies, torch.rand(1)]
            assert torch.is_grad_enabled() is gradients
        found.append(out)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        assert a.requires_grad == b.requires_grad
        assert a.stride() == b.stride()


def most_bytes_alive(graph: fx.Graph) -> int:
    """Of what a graph makes, if each tensor is freed after its last reader."""
    memory = Memory(graph)
    order = list(graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    change = [0] * (len(order) + 1)
    for members in memory.members.values():
        sizes = [_bytes(n) for n in members]
        if any(n.op in ("placeholder", "get_attr") for n in members) or not max(sizes):
            continue
        last = max(position[u] for n in members for u in (n, *n.users))
        change[position[members[0]]] += max(sizes)
        change[last + 1] -= max(sizes)
    alive = most = 0
    for each in change:
        alive += each
        most = max(most, alive)
    return most


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
