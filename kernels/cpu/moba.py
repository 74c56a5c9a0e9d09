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
from collections.abc import Sequence

import torch
from torch import Tensor

from moonfx.kernels.cpu import library as cpu_build

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


def available() -> str | None:
    """None if the kernel runs here (it is compiled now if need be), else why not and the remedy."""
    return cpu_build.library()[1]


def load() -> ctypes.CDLL:
    library, reason = cpu_build.library()
    if library is None:
        raise RuntimeError(reason)
    for name in ("moonfx_forward", "moonfx_backward", "moonfx_bfloat16"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def compute_dtype(library: ctypes.CDLL, dtype: torch.dtype) -> torch.dtype:
    """What the library multiplies for tensors of `dtype`."""
    native = dtype == torch.bfloat16 and library.moonfx_bfloat16()
    return torch.bfloat16 if native else torch.float32


def token_major(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros [B, H, N, D] over [B, N, H, D] storage: a model's transpose and reshape copy nothing.

    Zeroed memory comes from the system already zero, at no cost that `empty` would save.
    """
    B, H, N, D = shape
    return torch.zeros(B, N, H, D, dtype=dtype).transpose(1, 2)


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
    arguments = Arguments(threads=torch.get_num_threads(), **numbers)
    for field, tensor in tensors.items():
        if tensor is not None:
            setattr(arguments, field, tensor.data_ptr())
            if field in STRIDED:
                setattr(arguments, f"{field}_at", Strides(*tensor.stride()[:3]))
    query = tensors["query"]
    assert query is not None
    bfloat16 = ctypes.c_int64(query.dtype == torch.bfloat16)
    used: int = getattr(library, name)(ctypes.byref(arguments), bfloat16)
    if used < 0:
        raise MemoryError(f"{name}: no memory for the scratch of a query {tuple(query.shape)}")
    return used


def problem(
    query: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    sinks: int,
    scale: float | None,
    causal: bool,
    softcap: float,
) -> dict[str, int | float]:
    """The numbers of Arguments by name."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk, Dv = value.shape[1:]
    assert Nq <= Nk, (Nq, Nk)
    assert causal or Nq == Nk, (Nq, Nk)
    assert Hq % Hkv == 0, (Hq, Hkv)
    shape = {"B": B, "Hq": Hq, "Hkv": Hkv, "Nq": Nq, "Nk": Nk, "D": D, "Dv": Dv}
    policy = {"block": block, "topk": topk, "sinks": sinks, "causal": int(causal)}
    return shape | policy | {"scale": D**-0.5 if scale is None else scale, "softcap": softcap}


def about_keys(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    segments: Tensor | None,
    block_means: Tensor | None,
) -> dict[str, Tensor | None]:
    """What the keys carry beside themselves, as the library reads it."""
    if key_bias is not None:
        key_bias = key_bias.detach().float().expand(*query.shape[:2], key.shape[2])
    return {
        "key_mask": None if key_mask is None else key_mask.contiguous(),
        "key_bias": key_bias,
        "segments": None if segments is None else segments.long().contiguous(),
        "block_means": None if block_means is None else ready(block_means, torch.float32),
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    sinks: int,
    scale: float | None,
    key_mask: Tensor | None,
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    block_means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks.

    Args:
        query: [B, Hq, Nq, D] float32, bfloat16 or float16, any strides.
        key, value: [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv], query's dtype; Hkv divides Hq, Nq <= Nk.
        scale: factor on q.k, D**-0.5 when None.
        key_mask: bool [B, Nk], True for a real token; None when all are.
        causal: False lets a query see all real keys, and later blocks be chosen; then Nq == Nk.
        softcap: c > 0 makes a score c tanh(score / c); 0 for none.
        key_bias: [B or 1, Hq or 1, Nk], added to the scores behind the softcap; scale > 0 then.
        segments: integers [B, Nk]; a query sees the keys with its own token's number only.
        block_means: float32 [B, Hkv, m, D], m >= (Nk - 1) // block, causal and without segments:
            what the gate reads in place of the means of the keys.
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype over token-major storage, and lse [B, Hq, Nq] float32,
        the natural logarithm. A query that sees no real key gives 0 and -inf.
    Raises:
        RuntimeError: if there is no compiler. MemoryError: if there is no room for the scratch.
    """
    library = load()
    numbers = problem(query, value, block, topk, sinks, scale, causal, softcap)
    dtype = compute_dtype(library, query.dtype)
    out = token_major((*query.shape[:3], value.shape[3]), dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if lse.numel():
        tensors = about_keys(query, key, key_mask, key_bias, segments, block_means) | {
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
    block: int,
    topk: int,
    sinks: int,
    scale: float | None,
    key_mask: Tensor | None,
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    block_means: Tensor | None = None,
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
    numbers = problem(query, value, block, topk, sinks, scale, causal, softcap)
    dtype = compute_dtype(library, query.dtype)
    grad_query = token_major(query.shape, dtype)
    grad_key, grad_value = (token_major(x.shape, torch.float32) for x in (key, value))
    grad_bias = None
    if key_bias is not None:
        grad_bias = torch.zeros(*query.shape[:2], key.shape[2], dtype=torch.float32)
    if lse.numel():
        tensors = about_keys(query, key, key_mask, key_bias, segments, block_means) | {
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
