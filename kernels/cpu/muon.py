"""Momentum, norm and write-back of an optimizer step on the CPU: one pass over memory each.

    gather   M <- mu M + (1 - mu) G;  X = U / |U| in bfloat16,  U = mu M + (1 - mu) G
    scatter  W <- keep W + amount O

As torch operations these are ten passes over each matrix; Newton-Schulz in bfloat16 takes only some
seven times as long. The C++ is in muon.h.
"""

import ctypes

import torch
from torch import Tensor

from moonfx.kernels.cpu.library import load

DTYPES = (torch.float32, torch.bfloat16)
_POINTERS = ("weight", "grad", "buffer", "update")
_SIZES = ("rows", "columns", "weight_row", "grad_row", "buffer_row")
_FLAGS = ("nesterov", "cautious", "exact", "threads")
_NUMBERS = ("momentum", "sign", "decay", "keep", "amount", "eps")


class Arguments(ctypes.Structure):
    """The mirror of struct MuonArguments in muon.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_SIZES, *_FLAGS)),
        *((name, ctypes.c_double) for name in _NUMBERS),
    ]


def rows_of(matrix: Tensor) -> tuple[int, int, int] | None:
    """Rows, columns that lie beside each other, and the step between rows; None if it has more."""
    runs: list[tuple[int, int]] = [(1, 1)]  # outermost last: how many, and the step between them
    for size, step in zip(reversed(matrix.shape), reversed(matrix.stride()), strict=True):
        count, inner = runs[-1]
        if size == 1:
            continue
        if step == count * inner:
            runs[-1] = (count * size, inner)
        else:
            runs.append((size, step))
    if len(runs) == 1:
        return 1, runs[0][0], 0
    return (runs[1][0], runs[0][0], runs[1][1]) if len(runs) == 2 else None


def call(name: str, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """Runs "gather" or "scatter" on one matrix, whose tensors lie as `rows_of` has it."""
    library = load()
    arguments = Arguments(threads=torch.get_num_threads(), **numbers)
    dtype = torch.float32
    for field, tensor in tensors.items():
        setattr(arguments, field, tensor.data_ptr())
        if field != "update":
            found = rows_of(tensor)
            assert found is not None
            arguments.rows, arguments.columns, step = found
            setattr(arguments, f"{field}_row", step)
            dtype = tensor.dtype
    getattr(library, f"moonfx_muon_{name}")(
        ctypes.byref(arguments), ctypes.c_int64(dtype == torch.bfloat16)
    )
