"""One step of Muon's matrices: momentum, Newton-Schulz over stacks of equal shapes, write-back.

`update` takes the matrices that share a device, dtypes and an UpdateRule. Where they are many, it
goes through them in chunks: on a CPU small enough that what one pass over a chunk wrote is still in
its cache for the next, on a GPU large enough that a launch is nothing against the work.

A gradient that holds NaN or infinity makes NaN of its whole matrix, as every number of an update
depends on all of the gradient's. Other matrices, of the same stack too, are stepped as ever.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from moonfx.capture.marks import constant_when_traced
from moonfx.ops.newton_schulz import newton_schulz
from moonfx.optim.matrices import Layout, Shape, pieces, shapes, single
from moonfx.optim.state.low_bit import floats, has_codes
from moonfx.optim.state.low_bit import write as write_codes
from moonfx.optim.step import cpu_passes as passes
from moonfx.optim.step.gaussian_rms import correction
from moonfx.optim.step.norms import normalized

# What Newton-Schulz makes of a norm of 1 is nowhere near this: a norm below it is of zeros.
EPS = 1e-12
# As in norms.normalized: every normal number counts, and what is below fades out.
TINY = torch.finfo(torch.float32).tiny
CHUNK_BYTES = {"cpu": 16 << 20}
LARGEST_CHUNK = 256 << 20
COMPUTE = torch.bfloat16


class UpdateRule(NamedTuple):
    """The hyperparameters that all matrices of a bucket share."""

    momentum: float | Tensor
    nesterov: bool
    coefficients: tuple[float, ...]
    exact_rms: bool
    decay: str
    maximize: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> "UpdateRule":
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
    """A parameter to step, and all that its step takes.

    `scales` has for each of its pieces what brings Newton-Schulz's result to the target's root mean
    square. `group` numbers what shares lr and weight decay; a compiled step has these as tensors,
    but a weight decay of zero.
    """

    weight: Tensor
    grad: Tensor
    buffer: Tensor
    step: Tensor
    layout: Layout
    scales: tuple[float, ...]
    group: int
    lr: float | Tensor
    weight_decay: float | Tensor

    @property
    def shapes(self) -> list[Shape]:
        return shapes(tuple(self.weight.shape), self.layout)


def count(matrices: Sequence[Matrix]) -> None:
    """Adds the step that `update` is about to take."""
    torch._foreach_add_([x.step for x in matrices], 1)


def update(matrices: Sequence[Matrix], rule: UpdateRule) -> None:
    """Changes weights and buffers in place."""
    for chunk in chunks(matrices):
        _update_chunk(chunk, rule)


def chunks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Runs of matrices of equal layouts, as long as the device's cache or memory allows."""
    limit = _limit(matrices[0].weight)
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((tuple(matrix.weight.shape), matrix.layout), []).append(matrix)
    for same in alike.values():
        size = same[0].weight.numel() * torch.float32.itemsize
        count = max(1, limit // size)
        for first in range(0, len(same), count):
            yield same[first : first + count]


def _limit(tensor: Tensor) -> int:
    """Bytes of float32 that are stacked at a time."""
    return CHUNK_BYTES.get(tensor.device.type, LARGEST_CHUNK)


def _update_chunk(chunk: Sequence[Matrix], rule: UpdateRule) -> None:
    if has_codes(chunk[0].buffer):
        decoded = [x._replace(buffer=floats(x.buffer)) for x in chunk]
        _update_chunk(decoded, rule)
        for kept, x in zip(chunk, decoded, strict=True):
            write_codes(kept.buffer, x.buffer)
        return
    tensors = [(x.weight, x.grad, x.buffer) for x in chunk]
    if COMPUTE is torch.bfloat16 and all(passes.supports(*x, chunk[0].layout) for x in tensors):
        _update_on_cpu(chunk, rule)
    else:
        _update_by_torch(chunk, rule)


def _update_on_cpu(chunk: Sequence[Matrix], rule: UpdateRule) -> None:
    first = chunk[0]
    parts = [
        [single(x, first.layout) for x in (matrix.weight, matrix.grad, matrix.buffer)]
        for matrix in chunk
    ]
    before: dict[str, Any] = {"momentum": rule.momentum, "nesterov": rule.nesterov, "eps": TINY}
    before["sign"] = -1.0 if rule.maximize else 1.0
    after: dict[str, Any] = {"cautious": rule.decay == "cautious", "exact": rule.exact_rms}
    for i, (b, m, n) in enumerate(first.shapes):
        stack = torch.empty(len(chunk), b, m, n, dtype=torch.bfloat16)
        for matrix, part, slots in zip(chunk, parts, stack, strict=True):
            decay = float(matrix.weight_decay) if rule.decay == "coupled" else 0.0
            for weight, grad, buffer, slot in zip(*(x[i] for x in part), slots, strict=True):
                passes.gather(weight, grad, buffer, slot, decay=decay, **before)
        update = newton_schulz(stack.view(-1, m, n), rule.coefficients).view(stack.shape)
        for matrix, part, slots in zip(chunk, parts, update, strict=True):
            lr = float(matrix.lr)
            decay = lr * float(matrix.weight_decay)
            after["keep"] = 1 - decay if rule.decay == "decoupled" else 1.0
            after["amount"] = -lr * matrix.scales[i]
            for weight, slot in zip(part[0][i], slots, strict=True):
                passes.scatter(weight, slot, decay=decay, eps=EPS, **after)
    increment_version([x for matrix in chunk for x in (matrix.weight, matrix.buffer)])


def _update_by_torch(chunk: Sequence[Matrix], rule: UpdateRule) -> None:
    weights = [x.weight for x in chunk]
    buffers = [x.buffer for x in chunk]
    grads = [gradient(x, rule) for x in chunk]
    if isinstance(rule.momentum, Tensor):
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.lerp_(grad, 1 - rule.momentum)
    else:
        torch._foreach_lerp_(buffers, grads, 1 - rule.momentum)
    layout = chunk[0].layout
    parts = [[pieces(x, layout) for x in tensors] for tensors in (weights, buffers, grads)]
    for i, (b, m, n) in enumerate(chunk[0].shapes):
        views = [[p[i].view for p in part] for part in parts]
        for some, count in _batches(views[0][0], (b, m, n)):
            weight, averages, news = ([x[some] for x in tensors] for tensors in views)
            stack = _stack(averages, news, (len(chunk), count, m, n), rule)
            update = orthogonal(stack.view(-1, m, n), rule).view(stack.shape)
            for stretch in _stretches(chunk):
                like = chunk[stretch.start]
                write(like, weight[stretch], update[stretch], like.scales[i], rule)


def _batches(view: Tensor, shape: Shape) -> Iterator[tuple[slice, int]]:
    """Parts of a piece along its first dimension, and how many matrices each has.

    A stack of experts may be larger than a chunk; whatever else is one part.
    """
    b, m, n = shape
    most = max(1, _limit(view) // (m * n * torch.float32.itemsize))
    if view.shape[0] != b or b <= most:
        yield slice(None), b
        return
    for first in range(0, b, most):
        yield slice(first, first + most), min(most, b - first)


def rms_gain(m: int, n: int, coefficients: tuple[float, ...]) -> float:
    """What brings the root mean square of an orthogonalized [m, n] to 1, as far as a law says."""
    return math.sqrt(max(m, n)) / correction(m, n, coefficients)


@constant_when_traced
def scales_of(
    shape: torch.Size, layout: Layout, target: float, exact: bool, coefficients: tuple[float, ...]
) -> tuple[float, ...]:
    """What each piece of a parameter is multiplied by after Newton-Schulz, at lr 1."""
    return _scales(tuple(shape), layout, target, exact, coefficients)


@functools.lru_cache(maxsize=4096)
def _scales(
    shape: tuple[int, ...],
    layout: Layout,
    target: float,
    exact: bool,
    coefficients: tuple[float, ...],
) -> tuple[float, ...]:
    return tuple(
        target * (1.0 if exact else rms_gain(m, n, coefficients))
        for _, m, n in shapes(shape, layout)
    )


def gradient(matrix: Matrix, rule: UpdateRule) -> Tensor:
    """The gradient as it goes into the buffer; a view of the parameter's own, or a new tensor."""
    grad = matrix.grad.to(matrix.buffer.dtype)
    if rule.maximize:
        grad = -grad
    if rule.decay == "coupled" and _decays(matrix.weight_decay):
        grad = grad + matrix.weight_decay * matrix.weight
    return grad


def _decays(weight_decay: float | Tensor) -> bool:
    return isinstance(weight_decay, Tensor) or weight_decay != 0


def direction(buffer: Tensor, grad: Tensor, rule: UpdateRule) -> Tensor:
    """What is to be orthogonalized, from the buffer after the gradient went into it."""
    return torch.lerp(grad, buffer, rule.momentum) if rule.nesterov else buffer


def _stack(
    buffers: list[Tensor], grads: list[Tensor], shape: tuple[int, ...], rule: UpdateRule
) -> Tensor:
    """What is to be orthogonalized, contiguous [k, b, m, n]."""
    if isinstance(rule.momentum, Tensor):  # for a compiler: values, and no memory to write into
        values = [direction(b, g, rule) for b, g in zip(buffers, grads, strict=True)]
        return torch.stack([x.reshape(shape[1:]) for x in values])
    stack = torch.empty(shape, dtype=buffers[0].dtype, device=buffers[0].device)
    slots = [x.view(buffers[0].shape) for x in stack.unbind()]
    if not rule.nesterov:
        torch._foreach_copy_(slots, buffers)
    elif stack.is_cpu:  # one pass over memory where launches cost nothing
        for slot, buffer, grad in zip(slots, buffers, grads, strict=True):
            torch.lerp(grad, buffer, rule.momentum, out=slot)
    else:
        torch._foreach_copy_(slots, grads)
        torch._foreach_lerp_(slots, buffers, rule.momentum)
    return stack


def orthogonal(stack: Tensor, rule: UpdateRule) -> Tensor:
    """Newton-Schulz of each matrix of [k, m, n]; with `exact_rms`, of root mean square 1."""
    update = newton_schulz(normalized(stack).to(COMPUTE), rule.coefficients)
    if rule.exact_rms:
        update = update * (_inverse_norms(update) * math.sqrt(update[0].numel()))
    return update


def _inverse_norms(stack: Tensor) -> Tensor:
    dtype = torch.promote_types(stack.dtype, torch.float32)
    norms = torch.linalg.vector_norm(stack.flatten(1), dim=1, dtype=dtype)
    return norms.clamp_min(EPS).reciprocal()[:, None, None]


def _stretches(chunk: Sequence[Matrix]) -> list[slice]:
    """The stretches of a chunk that are written back alike."""
    found, first = [], 0
    for i in range(1, len(chunk) + 1):
        here = chunk[first]
        if i == len(chunk) or (here.group, here.scales) != (chunk[i].group, chunk[i].scales):
            found.append(slice(first, i))
            first = i
    return found


def write(
    like: Matrix, weights: list[Tensor], update: Tensor, scale: float, rule: UpdateRule
) -> None:
    """W <- W - lr wd W - lr s O for weights whose updates are O[i].

    A learning rate that lies on the weights' device is never read by the host.
    """
    lr, weight_decay = like.lr, like.weight_decay
    if isinstance(lr, Tensor) and lr.device != update.device and not torch.compiler.is_compiling():
        lr = float(lr)
    if rule.decay == "decoupled" and _decays(weight_decay):
        keep = 1 - lr * weight_decay
        torch._foreach_mul_(weights, keep)
    elif rule.decay == "cautious" and _decays(weight_decay):
        for weight, o in zip(weights, update.unbind(), strict=True):
            with_it = weight * o.view(weight.shape) > 0
            weight.sub_(torch.where(with_it, weight, 0) * (lr * weight_decay))
    alpha = 1.0
    if isinstance(lr, Tensor):
        update = update * (-lr * scale)
    else:
        alpha = -lr * scale
    if not update.is_cpu:  # torch's fast path takes equal dtypes
        update = update.to(weights[0].dtype)
    updates = [x.view(weights[0].shape) for x in update.unbind()]
    torch._foreach_add_(weights, updates, alpha=alpha)
