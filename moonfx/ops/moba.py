"""The operator moonfx::moba_attention: contract, autograd, FLOP formula, and which kernel runs.

    moonfx::moba_attention(q, k, v, block, topk, sinks, scale, key_mask) -> (out, lse)
    moonfx::moba_attention_backward(grad_out, grad_lse, q, k, v, out, lse, ...) -> (dq, dk, dv)

Shape letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim,
Dv value dim. Outputs lie token-major in memory, [B, N, H, D] seen as [B, H, N, D].
"""

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moonfx.fallback import warn_slow
from moonfx.kernels import cpu, tiled
from moonfx.policy import check_block_topk_sinks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@overload
def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    *,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    *,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    *,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189, eq. 2-6), always causal.

    Each query attends `topk` blocks of `block` tokens: its own, the first `sinks`, and the earlier
    ones whose mean key has the largest product with it. Ties go to the lower block. With
    Nk <= block * topk this is dense causal attention. No gradient flows through the choice.
    Under autocast the inputs are cast to its dtype, as F.scaled_dot_product_attention does.

    Args:
        query: [B, Hq, Nq, D], float32, bfloat16 or float16. Query i has position Nk - Nq + i.
        key: [B, Hkv, Nk, D], Nk >= Nq; Hq a multiple of Hkv.
        value: [B, Hkv, Nk, Dv].
        block: tokens per block, at least 1.
        topk: blocks per query, the own block and the sinks counted, at least 1.
        sinks: first blocks that every query attends, less than topk. 0 is the paper's rule.
        scale: factor on the products in the softmax; D**-0.5 by default.
        key_mask: bool [B, Nk], False for padding, which never counts: blocks start at each row's
            first real token. A query that sees no real key gives 0 (and lse -inf).
        return_lse: also return the logarithm of the softmax's denominator.
    Returns:
        [B, Hq, Nq, Dv] in query's dtype; with `return_lse` also float32 [B, Hq, Nq].
    Raises:
        TypeError: if block, topk or sinks is not an int, scale not a number, an input not a
            tensor, or a dtype is not one of those above or not the same for all three.
        ValueError: if block or topk < 1, sinks < 0 or >= topk, scale is not finite, or shapes or
            devices do not fit.
    """
    check_block_topk_sinks(block, topk, sinks)
    check_tensors(query, key, value, key_mask)
    if scale is not None:
        check_scale(scale)
        scale = float(scale)
    out, lse = torch.ops.moonfx.moba_attention(
        query, key, value, block, topk, sinks, scale, key_mask
    )
    return (out, lse) if return_lse else out


def check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or None, got {scale!r} ({type(scale).__name__})")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raises TypeError or ValueError, as in `moba_attention`, naming the tensor at fault."""
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, tokens, head_dim], "
                f"got {tensor.dim()}: {shape(tensor)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}"
            )
    for name, tensor in named[1:]:
        # Autocast will make them one, as it does for F.scaled_dot_product_attention.
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(
                f"{name} must have query's dtype, {dtype_name(query.dtype)}, "
                f"got {dtype_name(tensor.dtype)}"
            )
        check_device(name, tensor, query)
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have query's batch size, {query.shape[0]}, got {tensor.shape[0]}"
            )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query's head count must be a multiple of key's, got {query.shape[1]} query heads "
            f"and {key.shape[1]} key heads"
        )
    if value.shape[1] != key.shape[1]:
        raise ValueError(
            f"value must have as many heads as key, {key.shape[1]}, got {value.shape[1]}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have query's head_dim, {query.shape[3]}, got {key.shape[3]}")
    if value.shape[2] != key.shape[2]:
        raise ValueError(
            f"value must have as many tokens as key, {key.shape[2]}, got {value.shape[2]}"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must have no more tokens than key, {key.shape[2]} (attention is causal and the "
            f"last query is at the last key), got {query.shape[2]}"
        )
    if key_mask is not None:
        check_key_mask(key_mask, key)


def check_key_mask(key_mask: Tensor, key: Tensor) -> None:
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be bool, True for a real token, got {dtype_name(key_mask.dtype)}"
        )
    if key_mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_mask must be [batch, key tokens], [{key.shape[0]}, {key.shape[2]}], "
            f"got {shape(key_mask)}"
        )
    check_device("key_mask", key_mask, key)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on query's device, {like.device}, got {tensor.device}")


def shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel_for(device: torch.device) -> ModuleType:
    """The module whose `forward` and `backward` run on a device."""
    if device.type != "cpu":
        return tiled
    reason = cpu.available()
    if reason is None:
        return cpu
    warn_slow(
        "attention on the CPU runs as torch operations, several times slower than the C++ kernel",
        reason,
    )
    return tiled


def default_scale(scale: float | None, query: Tensor) -> float:
    return query.shape[3] ** -0.5 if scale is None else scale


# kernels/tiled.py waits on the host for its number of tiles, which a CUDA graph cannot record.
TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("moonfx::moba_attention", mutates_args=(), tags=TAGS)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    topk: int,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # Autocast off, or a kernel's own float32 products would be cast. A pass calls the operator
    # without `moba_attention`, and a kernel must never read out of bounds: hence the checks.
    with torch.autocast(query.device.type, enabled=False):
        check_block_topk_sinks(block, topk, sinks)
        check_tensors(query, key, value, key_mask)
        return kernel_for(query.device).forward(
            query, key, value, block, topk, sinks, default_scale(scale, query), key_mask
        )


@torch.library.custom_op("moonfx::moba_attention_backward", mutates_args=(), tags=TAGS)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    topk: int,
    sinks: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = default_scale(scale, query)
    with torch.autocast(query.device.type, enabled=False):
        check_block_topk_sinks(block, topk, sinks)
        check_tensors(query, key, value, key_mask)
        return kernel_for(query.device).backward(
            grad_out, grad_lse, query, key, value, out, lse, block, topk, sinks, scale, key_mask
        )


def by_token(tensor: Tensor, width: int | torch.SymInt) -> Tensor:
    """What a kernel returns for [B, H, N, width]: its strides are part of the contract."""
    batch, heads, length, _ = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


@_forward.register_fake
def _(query, key, value, block, topk, sinks=0, scale=None, key_mask=None):  # type: ignore[no-untyped-def]
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return by_token(query, value.shape[3]), lse


@_backward.register_fake
def _(grad_out, grad_lse, query, key, value, *rest, **named):  # type: ignore[no-untyped-def]
    return tuple(by_token(tensor, tensor.shape[3]) for tensor in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.policy, key_mask = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask)
    ctx.set_materialize_grads(False)  # lse is seldom used: no zeros for its gradient


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, key_mask = ctx.saved_tensors
    constants = (None,) * 5
    if grad_out is None and grad_lse is None:
        return None, None, None, *constants
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.moonfx.moba_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *ctx.policy, key_mask
    )
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if need else None for grad, need in needed), *constants


_forward.register_autograd(_autograd, setup_context=_setup_context)

# torch.library.register_autocast casts to one fixed dtype; attention follows autocast's own.
_library = torch.library.Library("moonfx", "FRAGMENT")


def _autocast(device_type: str) -> Any:
    def cast(query, key, value, *rest, **named):  # type: ignore[no-untyped-def]
        dtype = torch.get_autocast_dtype(device_type)
        inputs = [x.to(dtype) if x.dtype in DTYPES else x for x in (query, key, value)]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.moonfx.moba_attention(*inputs, *rest, **named)

    return cast


_library.impl("moba_attention", _autocast("cpu"), "AutocastCPU")
_library.impl("moba_attention", _autocast("cuda"), "AutocastCUDA")


def attended_keys(queries: int, keys: int, block: int, topk: int) -> int:
    """Keys that `queries` last of `keys` tokens attend together, per head: the selected work."""

    def before(position: int) -> int:
        """Keys that the queries at positions 0 .. position - 1 attend."""
        dense = min(position, block * topk)
        full, part = divmod(position - dense, block)
        own = full * block * (block + 1) // 2 + part * (part + 1) // 2
        return dense * (dense + 1) // 2 + (position - dense) * (topk - 1) * block + own

    return before(keys) - before(keys - queries)


@register_flop_formula(torch.ops.moonfx.moba_attention)
def forward_flops(query, key, value, block, topk, *rest, **named) -> int:  # type: ignore[no-untyped-def]
    """Two products over the attended keys; without the gate, and as if nothing were padding."""
    batch, heads, queries, dim = query
    keys = attended_keys(queries, key[2], block, topk)
    return batch * heads * keys * 2 * (dim + value[3])


@register_flop_formula(torch.ops.moonfx.moba_attention_backward)
def backward_flops(  # type: ignore[no-untyped-def]
    grad_out, grad_lse, query, key, value, out, lse, block, topk, *rest, **named
) -> int:
    """Five products: scores, dP and dV, dQ, dK; 2.5 times the forward for D = Dv."""
    batch, heads, queries, dim = query
    keys = attended_keys(queries, key[2], block, topk)
    return batch * heads * keys * 2 * (3 * dim + 2 * value[3])
