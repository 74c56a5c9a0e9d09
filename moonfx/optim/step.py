"""One step of Muon's matrices: momentum, Newton-Schulz over stacks of equal shapes, write-back.

`update` takes the matrices that share a device, dtypes and a Rule. Where they are many, it goes
through them in chunks: on a CPU small enough that what one pass over a chunk wrote is still in its
cache for the next, on a GPU large enough that a launch is nothing against the work.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moonfx.optim.matrices import Layout, Shape, pieces, shapes
from moonfx.optim.rms import correction

MUON = "muon"
# A norm below this is taken for zero. In float32 the squares of numbers of such a norm are still
# normal numbers for matrices of up to 1e8 of them, so what is above it is normalized in full.
EPS = 1e-12
CHUNK_BYTES = {"cpu": 4 << 20}
LARGEST_CHUNK = 256 << 20
COMPUTE = torch.bfloat16


class Rule(NamedTuple):
    """The hyperparameters that all matrices of a bucket share."""

    momentum: float
    nesterov: bool
    coefficients: tuple[float, ...]
    exact_rms: bool
    decay: str
    maximize: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> "Rule":
        steps = group["coefficients"]
        return cls(
            group["momentum"],
            group["nesterov"],
            tuple(itertools.chain.from_iterable(steps)),
            group["exact_rms"],
            group["decay"],
            bool(group.get("maximize", False)),
        )


class Matrix(NamedTuple):
    """A parameter to step, and all that its step takes."""

    weight: Tensor
    grad: Tensor
    buffer: Tensor
    step: Tensor
    layout: Layout
    target: float
    lr: float | Tensor
    weight_decay: float

    @property
    def shapes(self) -> list[Shape]:
        return shapes(tuple(self.weight.shape), self.layout)


def update(matrices: Sequence[Matrix], rule: Rule) -> None:
    """Steps the matrices in place."""
    torch._foreach_add_([x.step for x in matrices], 1)
    for chunk in chunks(matrices):
        _update_chunk(chunk, rule)


def chunks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Runs of matrices of equal layouts, as long as the device's cache or memory allows."""
    device = matrices[0].weight.device
    limit = CHUNK_BYTES.get(device.type, LARGEST_CHUNK)
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((tuple(matrix.weight.shape), matrix.layout), []).append(matrix)
    for same in alike.values():
        size = same[0].weight.numel() * torch.float32.itemsize
        count = max(1, limit // size)
        for first in range(0, len(same), count):
            yield same[first : first + count]


def _update_chunk(chunk: Sequence[Matrix], rule: Rule) -> None:
    weights = [x.weight for x in chunk]
    buffers = [x.buffer for x in chunk]
    grads = [_gradient(x, rule) for x in chunk]
    torch._foreach_lerp_(buffers, grads, 1 - rule.momentum)
    layout = chunk[0].layout
    parts = [[pieces(x, layout) for x in tensors] for tensors in (weights, buffers, grads)]
    for i, (b, m, n) in enumerate(chunk[0].shapes):
        weight, buffer, grad = ([p[i].view for p in part] for part in parts)
        stack = _stack(buffer, grad, (len(chunk) * b, m, n), rule)
        update = _orthogonal(stack, rule)
        views = update.view(len(chunk), b * m * n).unbind()
        for run in _runs(chunk):
            target = run[0][1].target
            scale = target * math.sqrt(max(m, n)) / correction(m, n, rule.coefficients)
            ...
