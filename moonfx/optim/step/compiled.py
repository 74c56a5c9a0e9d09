"""The step of a bucket as one compiled graph, and whether that is faster than the eager one.

A graph is compiled for what does not change from step to step: shapes, layouts, targets and the
UpdateRule. Learning rate, weight decay and momentum go in as tensors, so that no schedule compiles
again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moonfx.capture.compiled_calls import compile_step
from moonfx.optim.matrices import Layout
from moonfx.optim.step.update import Matrix, UpdateRule, count, update

Rates = list[list[Tensor | float]]  # lr and weight decay of each group
Graph = Callable[[list[Tensor], list[Tensor], list[Tensor], Rates, Tensor], None]


class Fixed(NamedTuple):
    """What a graph knows of a matrix."""

    layout: Layout
    scales: tuple[float, ...]
    group: int
    weight: torch.Size
    strides: tuple[tuple[int, ...], ...]


class Choice(NamedTuple):
    """Whether a bucket's step is compiled, and why."""

    compiled: bool
    why: str


def compiled_or_eager(asked: bool | None, matrices: Sequence[Matrix]) -> Choice:
    """What `compile=` comes to for a bucket."""
    device = matrices[0].weight.device
    if any(is_wrapped(x) for x in matrices):
        return Choice(False, "sharded and low-bit tensors are stepped one by one")
    if asked is not None:
        return Choice(asked, f"compile={asked} was asked for")
    if device.type == "cpu":
        return Choice(False, ON_CPU)
    return Choice(True, f"on {device.type} it launches fewer kernels, which read less memory")


ON_CPU = (
    "on a CPU two passes of C++ around Newton-Schulz are as fast as a graph, which takes seconds "
    "per matrix to compile"
)


def is_wrapped(matrix: Matrix) -> bool:
    """Whether a tensor is of a class of its own, as DTensor or torchao's states are."""
    tensors = (matrix.weight, matrix.grad, matrix.buffer)
    return any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)


class Graphs:
    """The compiled steps of an optimizer's buckets."""

    def __init__(self) -> None:
        self.made: dict[tuple[object, ...], Graph] = {}

    def update(self, matrices: Sequence[Matrix], rule: UpdateRule) -> None:
        """As step.update."""
        numbers = {group: i for i, group in enumerate(dict.fromkeys(x.group for x in matrices))}
        rates: Rates = [[0.0, 0.0] for _ in numbers]
        for x in matrices:
            rates[numbers[x.group]] = [_tensor(x.lr), x.weight_decay and _tensor(x.weight_decay)]
        fixed = tuple(
            Fixed(
                *(x.layout, x.scales, numbers[x.group], x.weight.shape),
                tuple(y.stride() for y in (x.weight, x.grad, x.buffer)),
            )
            for x in matrices
        )
        decays = tuple(isinstance(wd, Tensor) for _, wd in rates)
        first = matrices[0]
        kinds = (first.weight.device, first.weight.dtype, first.grad.dtype, first.buffer.dtype)
        key = (fixed, decays, rule._replace(momentum=0.0), *kinds)
        graph = self.made.get(key)
        if graph is None:
            graph = self.made[key] = compile_step(_graph(fixed, rule))
        count(matrices)
        weights = [x.weight.detach() for x in matrices]
        grads, buffers = [x.grad for x in matrices], [x.buffer for x in matrices]
        graph(weights, grads, buffers, rates, _tensor(rule.momentum))


def _tensor(number: float | Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float32)


def _graph(fixed: tuple[Fixed, ...], rule: UpdateRule) -> Graph:
    def graph(
        weights: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        rates: Rates,
        momentum: Tensor,
    ) -> None:
        matrices = [
            Matrix(w, g, b, momentum, x.layout, x.scales, x.group, *rates[x.group])
            for w, g, b, x in zip(weights, grads, buffers, fixed, strict=True)
        ]
        update(matrices, rule._replace(momentum=momentum))

    return graph
