"""What may be asked of moonfx::moba_attention: errors that name the argument and what it may be."""

import math

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_scale(scale: float | None, key_bias: Tensor | None) -> None:
    if scale is None:
        return
    check_number("scale", scale, "a number or None")
    if key_bias is not None and scale <= 0:
        raise ValueError(
            f"scale must be above 0 with a key_bias (the gate divides by it), got {scale}"
        )


def check_softcap(softcap: float) -> None:
    check_number("softcap", softcap, "a number")
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or more, got {softcap}")


def check_number(name: str, number: float, what: str) -> None:
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise TypeError(f"{name} must be {what}, got {number!r} ({type(number).__name__})")
    if not -math.inf < number < math.inf:  # not math.isfinite, which Dynamo cannot trace
        raise ValueError(f"{name} must be finite, got {number}")


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
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


def check_causal(causal: bool, query: Tensor, key: Tensor) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r} ({type(causal).__name__})")
    if causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must have no more tokens than key, {key.shape[2]} (attention is causal and the "
            f"last query is at the last key), got {query.shape[2]}"
        )
    if not causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query must have as many tokens as key, {key.shape[2]}, with causal=False (query i is "
            f"at key i), got {query.shape[2]}"
        )


def check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be bool, True for a real token, got {dtype_name(key_mask.dtype)}"
        )
    check_by_key("key_mask", key_mask, key)


def check_segments(segments: Tensor | None, key: Tensor) -> None:
    if segments is None:
        return
    if not isinstance(segments, Tensor):
        raise TypeError(f"segments must be a tensor or None, got {type(segments).__name__}")
    if segments.dtype not in INTEGERS:
        raise TypeError(
            f"segments must be integers, one number per sequence, got {dtype_name(segments.dtype)}"
        )
    check_by_key("segments", segments, key)


def check_block_means(arguments: MobaArguments, key: Tensor) -> None:
    means = arguments.block_means
    if means is None:
        return
    if not isinstance(means, Tensor):
        raise TypeError(f"block_means must be a tensor or None, got {type(means).__name__}")
    if means.dtype != torch.float32:
        raise TypeError(f"block_means must be float32, got {dtype_name(means.dtype)}")
    batch, heads, length, dim = key.shape
    least = max(length - 1, 0) // arguments.block
    fits = means.dim() == 4 and means.shape[:2] == (batch, heads) and means.shape[3] == dim
    if not fits or means.shape[2] < least:
        raise ValueError(
            f"block_means must be [batch, key heads, blocks, head_dim], [{batch}, {heads}, "
            f"{least} or more, {dim}], got {shape(means)}"
        )
    if arguments.segments is not None:
        raise ValueError("block_means must be None with segments, whose blocks are their own")
    if not arguments.causal:
        raise ValueError("block_means must be None with causal=False, which needs the last block's")
    check_device("block_means", means, key)


def check_key_bias(key_bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    if key_bias is None:
        return
    if not isinstance(key_bias, Tensor):
        raise TypeError(f"key_bias must be a tensor or None, got {type(key_bias).__name__}")
    if key_bias.dtype != torch.float32:
        raise TypeError(f"key_bias must be float32, got {dtype_name(key_bias.dtype)}")
    batch, heads, length = query.shape[0], query.shape[1], key.shape[2]
    fits = key_bias.dim() == 3 and key_bias.shape[2] == length
    if not fits or key_bias.shape[0] not in (1, batch) or key_bias.shape[1] not in (1, heads):
        raise ValueError(
            f"key_bias must be [batch or 1, query heads or 1, key tokens], [{batch} or 1, "
            f"{heads} or 1, {length}], got {shape(key_bias)}"
        )
    check_device("key_bias", key_bias, query)


def check_sink_logits(sink_logits: Tensor | None, query: Tensor) -> None:
    if sink_logits is None:
        return
    if not isinstance(sink_logits, Tensor):
        raise TypeError(f"sink_logits must be a tensor or None, got {type(sink_logits).__name__}")
    if sink_logits.dtype not in DTYPES:
        raise TypeError(
            f"sink_logits must be float32, bfloat16 or float16, got {dtype_name(sink_logits.dtype)}"
        )
    if sink_logits.shape != (query.shape[1],):
        raise ValueError(
            f"sink_logits must be [query heads], [{query.shape[1]}], got {shape(sink_logits)}"
        )
    check_device("sink_logits", sink_logits, query)


def check_by_key(name: str, tensor: Tensor, key: Tensor) -> None:
    if tensor.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"{name} must be [batch, key tokens], [{key.shape[0]}, {key.shape[2]}], "
            f"got {shape(tensor)}"
        )
    check_device(name, tensor, key)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on query's device, {like.device}, got {tensor.device}")


def shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
