"""The step of parameters that are sharded over processes, as FSDP2's fully_shard leaves them.

    M, G, W    lie in shards, and so do the passes over them
    U          is gathered whole: Newton-Schulz needs every row and column of a matrix
    O          is computed by every process, which then keeps its own shard: nothing is sent back

So each process holds its share of the momentum, one matrix is whole at a time, and all have the
same result, that of a single process but for the order of roundings. Each computes Newton-Schulz in
full, and receives as many numbers as FSDP gathers for a forward.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moonfx.optim.matrices import pieces
from moonfx.optim.sharding import is_sharded
from moonfx.optim.state.low_bit import floats, has_codes
from moonfx.optim.state.low_bit import write as write_codes
from moonfx.optim.step.update import Matrix, UpdateRule, direction, gradient, orthogonal, write

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def update_sharded(matrices: Sequence[Matrix], rule: UpdateRule) -> None:
    """As step.update, for DTensors. Every process calls it with the same parameters."""
    for matrix in matrices:
        p = matrix.weight
        assert is_sharded(p)
        local = _local(matrix, p)
        coded = has_codes(local.buffer)
        buffer = floats(local.buffer) if coded else local.buffer
        grad = gradient(local._replace(buffer=buffer), rule)
        buffer.lerp_(grad, 1 - rule.momentum)
        if coded:
            write_codes(local.buffer, buffer)
        update = _orthogonalized(_gathered(direction(buffer, grad, rule), p), matrix, rule)
        write(local, [local.weight], _own_part(update, p)[None], 1.0, rule)


def _local(matrix: Matrix, p: "DTensor") -> Matrix:
    grad, buffer = matrix.grad, matrix.buffer
    if is_sharded(grad):
        grad = grad.redistribute(placements=p.placements).to_local()
    if is_sharded(buffer):
        buffer = buffer.to_local()
    return matrix._replace(weight=p.to_local(), grad=grad, buffer=buffer)


def _gathered(local: Tensor, p: "DTensor") -> Tensor:
    mesh, shape, stride = p.device_mesh, p.shape, p.stride()
    sharded = type(p).from_local(
        local.contiguous(), mesh, p.placements, run_check=False, shape=shape, stride=stride
    )
    return sharded.full_tensor()


def _own_part(everywhere: Tensor, p: "DTensor") -> Tensor:
    """This process's shard of what all processes have."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate()] * p.device_mesh.ndim
    replicated = type(p).from_local(everywhere, p.device_mesh, placements, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def _orthogonalized(full: Tensor, matrix: Matrix, rule: UpdateRule) -> Tensor:
    """Each piece after Newton-Schulz, times its scale; float32 for bfloat16 results."""
    out = torch.empty(full.shape, dtype=torch.float32, device=full.device)
    found, into = pieces(full, matrix.layout), pieces(out, matrix.layout)
    for (view, shape), (target, _), scale in zip(found, into, matrix.scales, strict=True):
        update = orthogonal(view.reshape(shape), rule)
        target.copy_((update.float() * scale).view(target.shape))
    return out
