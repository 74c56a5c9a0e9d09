"""MoBA attention on the CPU: block-sparse flash attention in C++ (arXiv 2502.13189, eq. 2-6).

    s_j = q . mean(K_j) + mean(b_j) / scale  the gate, float32, no gradient (eq. 6)
    T = tanh(scale Q K^T / c), S = c T + b   (softcap c, key bias b; S = scale Q K^T without)
    m = max S, l = sum exp(S - m)            streamed over a query's blocks, ascending
    O = exp(S - m) V / l, lse = m + log l
    P = exp(S - lse), dS = P (dO V^T - sum(dO O) + dlse), db = sum of dS over queries
    dT = dS (1 - T^2) scale, dQ = dT K, dK = dT^T Q, dV = P^T dO

A unit of work is a run of queries of one kv head, with all the query heads that share it. It sorts
its rows by the block that they selected, so that each block of K and V is read once for all of
them, six rows at a time, and scores never leave the first-level cache.

float32, and bfloat16 where there is AVX512-BF16, are multiplied as they are; the softmax's weights
are then rounded to bfloat16, as scaled_dot_product_attention does. float16, and bfloat16 elsewhere,
are computed in float32. Gate, softmax and sums are float32 always. Routing is the same for one
query as for many, backward repeats bit for bit, and neither pass depends on the number of threads.

A row of the batch, or each of its segments, is a list of real tokens, numbered by rank; lists share
nothing, and a unit belongs to one. So a packed sequence gives, bit for bit, what it gives alone
(where it has more than 32 rows per kv head).

Scratch grows with the sequence, never with its square: packed copies of K and V (2 forward, 3
backward; a segment's padded to twice its keys at most), the block means, and per thread the
accumulators of one unit. Up to 32 rows per kv head (decoding) pack neither, and with `block_means`
given they read no key outside the selected blocks.
"""

import ctypes

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import zeros_by_token
from moonfx.kernels.cpu.library import available, compute_dtype, load

__all__ = ("available", "backward", "forward")  # a backend's face: moonfx/ops/dispatch.py

STRIDED = (
    *("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value"),
    *("key_bias", "block_means"),
)
POINTERS = (
    *("query", "key", "value", "out", "lse", "key_mask", "key_bias", "segments"),
    *("block_means", "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "grad_bias"),
)
SIZES = ("B", "Hq", "Hkv", "Nq", "Nk", "D", "Dv", "block", "topk", "sinks", "causal", "threads")


class Strides(ctypes.Structure):
    """Steps between batch entries, heads and tokens, in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "token")]


class Arguments(ctypes.Structure):
    """The mirror of struct Arguments in plan.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((f"{name}_at", Strides) for name in STRIDED),
    ]


def ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def call(
    library: ctypes.CDLL,
    name: str,
    tensors: dict[str, Tensor | None],
    numbers: dict[str, int | float],
) -> int:
    """Runs one entry point on `ready` tensors; returns the bytes of scratch that it used."""
    struct = Arguments(threads=torch.get_num_threads(), **numbers)
    for field, tensor in tensors.items():
        if tensor is not None:
            setattr(struct, field, tensor.data_ptr())
            if field in STRIDED:
                setattr(struct, f"{field}_at", Strides(*tensor.stride()[:3]))
    query = tensors["query"]
    assert query is not None
    bfloat16 = ctypes.c_int64(query.dtype == torch.bfloat16)
    used: int = getattr(library, name)(ctypes.byref(struct), bfloat16)
    if used < 0:
        raise MemoryError(f"{name}: no memory for the scratch of a query {tuple(query.shape)}")
    return used


def numbers_of(query: Tensor, value: Tensor, arguments: MobaArguments) -> dict[str, int | float]:
    """The numbers of Arguments by name."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk, Dv = value.shape[1:]
    assert Nq <= Nk, (Nq, Nk)
    assert arguments.causal or Nq == Nk, (Nq, Nk)
    assert Hq % Hkv == 0, (Hq, Hkv)
    return {
        "B": B,
        "Hq": Hq,
        "Hkv": Hkv,
        "Nq": Nq,
        "Nk": Nk,
        "D": D,
        "Dv": Dv,
        "block": arguments.block,
        "topk": arguments.topk,
        "sinks": arguments.sinks,
        "causal": int(arguments.causal),
        "scale": arguments.scale_for(D),
        "softcap": arguments.softcap,
    }


def by_key(query: Tensor, key: Tensor, arguments: MobaArguments) -> dict[str, Tensor | None]:
    """What the keys carry beside themselves, as the library reads it."""
    mask, bias = arguments.key_mask, arguments.key_bias
    segments, means = arguments.segments, arguments.block_means
    if bias is not None:
        bias = bias.detach().float().expand(*query.shape[:2], key.shape[2])
    return {
        "key_mask": None if mask is None else mask.contiguous(),
        "key_bias": bias,
        "segments": None if segments is None else segments.long().contiguous(),
        "block_means": None if means is None else ready(means, torch.float32),
    }


def forward(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks.

    Args:
        query: [B, Hq, Nq, D] float32, bfloat16 or float16, any strides.
        key, value: [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv], query's dtype; Hkv divides Hq, Nq <= Nk.
        arguments: as in kernels/reference/moba.py, whose results these are to rounding; with a
            key_bias the scale is above 0.
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype over token-major storage, and lse [B, Hq, Nq] float32,
        the natural logarithm. A query that sees no real key gives 0 and -inf.
    Raises:
        RuntimeError: if there is no compiler. MemoryError: if there is no room for the scratch.
    """
    library = load()
    numbers = numbers_of(query, value, arguments)
    dtype = compute_dtype(library, query.dtype)
    out = zeros_by_token((*query.shape[:3], value.shape[3]), dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if lse.numel():
        tensors = by_key(query, key, arguments) | {
            "query": ready(query, dtype),
            "key": ready(key, dtype),
            "value": ready(value, dtype),
            "out": out,
            "lse": lse,
        }
        call(library, "moonfx_forward", tensors, numbers)
    return out.to(query.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad_out: like out. grad_lse: like lse, or None. The others as `forward` took and gave them.
    Returns:
        The gradients of query, key and value, in their dtype and over token-major storage, and that
        of the key bias as if it were not broadcast, float32 [B, Hq, Nk]: None without one.
    Raises:
        RuntimeError: if there is no compiler. MemoryError: if there is no room for the scratch.
    """
    library = load()
    numbers = numbers_of(query, value, arguments)
    dtype = compute_dtype(library, query.dtype)
    grad_query = zeros_by_token(query.shape, dtype)
    grad_key, grad_value = (zeros_by_token(x.shape, torch.float32) for x in (key, value))
    grad_bias = None
    if arguments.key_bias is not None:
        grad_bias = torch.zeros(*query.shape[:2], key.shape[2], dtype=torch.float32)
    if lse.numel():
        tensors = by_key(query, key, arguments) | {
            "query": ready(query, dtype),
            "key": ready(key, dtype),
            "value": ready(value, dtype),
            "out": ready(out, dtype),
            "lse": lse.contiguous(),
            "grad_out": ready(grad_out, dtype),
            "grad_lse": None if grad_lse is None else grad_lse.float().contiguous(),
            "grad_query": grad_query,
            "grad_key": grad_key,
            "grad_value": grad_value,
            "grad_bias": grad_bias,
        }
        call(library, "moonfx_backward", tensors, numbers)
    grads = grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
    return *grads, grad_bias
