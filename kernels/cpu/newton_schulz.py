"""Newton-Schulz steps on the CPU, in C++ (newton_schulz.h has the mathematics).

float32, and bfloat16 where there is AVX512-BF16, are multiplied as they are, with float32 sums;
float16, and bfloat16 elsewhere, are computed in float32 and rounded once. A matrix's result depends
neither on the others of its batch nor on the number of threads.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import Coefficients
from moonfx.kernels.cpu.library import compute_dtype, load

SIZES = ("batch", "m", "n", "run_count", "threads")
STRIDES = ("X_batch", "X_row", "X_column", "out_batch", "out_row", "out_column")


class Arguments(ctypes.Structure):
    """The mirror of struct NewtonSchulzArguments in newton_schulz.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("X", "out", "coefficients", "runs")),
        *((name, ctypes.c_int64) for name in (*SIZES, *STRIDES)),
    ]


def newton_schulz(X: Tensor, coefficients: Coefficients, runs: Sequence[int]) -> Tensor:
    """The steps of [b, m, n], m <= n and none 0, in new memory; by columns if X lies by columns.

    Args:
        runs: how many steps go on between two visits of X; they sum to the number of steps.
    Raises:
        RuntimeError: if there is no compiler. MemoryError: if there is no room for the scratch.
    """
    library = load()
    dtype = compute_dtype(library, X.dtype)
    rows = X.stride()[1:]
    given = X if X.dtype == dtype else X.detach().to(dtype)
    if 1 not in given.stride()[1:]:
        given = given.contiguous()
    B, m, n = given.shape
    if rows[0] == 1 and rows[1] != 1:
        out = torch.empty((B, n, m), dtype=dtype).mT
    else:
        out = torch.empty((B, m, n), dtype=dtype)
    flat, lengths = constants(tuple(coefficients), tuple(runs))
    arguments = Arguments(
        *(given.data_ptr(), out.data_ptr(), ctypes.addressof(flat), ctypes.addressof(lengths)),
        *(B, m, n, len(runs), torch.get_num_threads()),
        *(*given.stride(), *out.stride()),
    )
    native = ctypes.c_int64(dtype == torch.bfloat16)
    if library.moonfx_newton_schulz(ctypes.byref(arguments), native) < 0:
        raise MemoryError(f"no memory for the scratch of Newton-Schulz on {tuple(X.shape)}")
    return out if X.dtype == dtype else out.to(X.dtype)


@functools.lru_cache(maxsize=256)
def constants(
    coefficients: tuple[tuple[float, float, float], ...], runs: tuple[int, ...]
) -> tuple[ctypes.Array[ctypes.c_double], ctypes.Array[ctypes.c_int64]]:
    """Of a call, as the library reads them; an optimizer's are the same at every step."""
    numbers = [number for step in coefficients for number in step]
    return (ctypes.c_double * len(numbers))(*numbers), (ctypes.c_int64 * len(runs))(*runs)
