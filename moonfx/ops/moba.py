"""The operator moonfx::moba_attention: contract, autograd, and which kernel runs.

    moonfx::moba_attention(q, k, v, block, topk, sinks, scale, key_mask, causal, softcap,
                           key_bias, segments, block_means, recompute) -> (out, lse, routes)
    moonfx::moba_attention_backward(grad_out, grad_lse, q, k, v, out, lse, routes, block, ...)
        -> (dq, dk, dv, db)

`routes` is what a GPU kernel keeps of the choice of blocks for the backward (moonfx/ops/dispatch.py
says when, and its shape); empty, the backward chooses again. It has no gradient.

Shape letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim,
Dv value dim. Outputs lie token-major in memory, [B, N, H, D] seen as [B, H, N, D].
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.ops import checks
from moonfx.ops.dispatch import TAGS, kept_routes, kernel_for, routes_shape, routes_to_keep
from moonfx.policy import check_block_topk_sinks, check_flag


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
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    sink_logits: Tensor | None = None,
    block_means: Tensor | None = None,
    recompute_routing: bool = False,
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
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    sink_logits: Tensor | None = None,
    block_means: Tensor | None = None,
    recompute_routing: bool = False,
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
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    sink_logits: Tensor | None = None,
    block_means: Tensor | None = None,
    recompute_routing: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189, eq. 2-6).

    Each query attends `topk` blocks of `block` tokens: its own, the first `sinks`, and the earlier
    ones whose mean key has the largest product with it. Ties go to the lower block. With
    Nk <= block * topk this is dense attention. No gradient flows through the choice.
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
        causal: False lets a query see later keys as well, and choose later blocks; then Nq = Nk.
        softcap: c > 0 bounds the softmax's scores, as c * tanh(score / c); 0.0 does not. The
            choice of blocks does not see it.
        key_bias: float32 [B or 1, Hq or 1, Nk], added to the scaled and capped scores of each key;
            its block mean, over `scale`, to the score of a block. Differentiable. ALiBi is
            slope[h] * j: it differs from -slope[h] * (i - j) by what softmax does not see.
        segments: integers [B, Nk], the packed sequence that each token is of, in any order: each
            sequence is computed as if it were alone, with blocks of its own.
        sink_logits: [Hq], float32, bfloat16 or float16, one more logit in each head's softmax, of a
            key whose value is 0 (as in GPT-OSS). Differentiable; `sinks` are something else.
        block_means: float32 [B, Hkv, m, D], m >= (Nk - 1) // block: the mean of the real keys of
            each row's j-th block, which the choice then reads in place of the keys (a cache has
            them). Causal only, and not with segments.
        recompute_routing: choose the blocks again in the backward, where a GPU kernel would
            otherwise keep 4 topk bytes per query and head; same gradients.
        return_lse: also return the logarithm of the softmax's denominator.
    Returns:
        [B, Hq, Nq, Dv] in query's dtype; with `return_lse` also float32 [B, Hq, Nq].
    Raises:
        TypeError: if block, topk or sinks is not an int, causal or recompute_routing not a bool,
            scale or softcap not a number, an input not a tensor, or a dtype is not one of those
            above or not the same for query, key and value.
        ValueError: if block or topk < 1, sinks < 0 or >= topk, softcap < 0, scale or softcap is not
            finite, scale <= 0 with a key_bias, Nq != Nk without causal, block_means with segments
            or without causal, or shapes or devices do not fit.
    """
    arguments = MobaArguments(
        *(block, topk, sinks, scale, key_mask, causal, softcap, key_bias, segments, block_means)
    )
    check(query, key, value, arguments)
    checks.check_sink_logits(sink_logits, query)
    check_flag("recompute_routing", recompute_routing)
    if type(softcap) is not float or type(scale) not in (float, type(None)):
        arguments = arguments._replace(
            scale=None if scale is None else float(scale), softcap=float(softcap)
        )
    out, lse, _ = torch.ops.moonfx.moba_attention(query, key, value, *arguments, recompute_routing)
    if sink_logits is not None:
        out, lse = with_sink(out, lse, sink_logits)
    return (out, lse) if return_lse else out


def with_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose denominator has exp(sink_logits[head]) more, from the one without."""
    sink = sink_logits.float()[:, None]
    kept = torch.sigmoid(lse - sink)
    return (out * kept.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, sink)


def check(query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments) -> None:
    """Raises TypeError or ValueError as `moba_attention` says."""
    check_block_topk_sinks(arguments.block, arguments.topk, arguments.sinks)
    checks.check_tensors(query, key, value)
    checks.check_causal(arguments.causal, query, key)
    checks.check_softcap(arguments.softcap)
    checks.check_key_mask(arguments.key_mask, key)
    checks.check_key_bias(arguments.key_bias, query, key)
    checks.check_segments(arguments.segments, key)
    checks.check_block_means(arguments, key)
    checks.check_scale(arguments.scale, arguments.key_bias)


# What follows the tensors in both operators. Exported programs and cache keys hold to it.
SCHEMA = (
    "SymInt block, SymInt topk, SymInt sinks=0, float? scale=None, Tensor? key_mask=None, "
    "bool causal=True, float softcap=0.0, Tensor? key_bias=None, Tensor? segments=None, "
    "Tensor? block_means=None"
)
TENSORS = ("query", "key", "value")
COUNT = len(MobaArguments._fields)
INPUTS = (*TENSORS, *MobaArguments._fields, "recompute")  # of the forward operator


def parse(
    rest: Sequence[Any], named: Mapping[str, Any] | None = None
) -> tuple[MobaArguments, bool]:
    """The arguments, and `recompute`, from what follows an operator's tensors.

    Args:
        rest: by position; the dispatcher leaves out last ones that are the defaults.
    """
    given = dict(named or {})
    recompute = given.pop("recompute", rest[COUNT] if len(rest) > COUNT else False)
    return MobaArguments(*rest[:COUNT], **given), recompute


@torch.library.custom_op(
    "moonfx::moba_attention",
    mutates_args=(),
    tags=TAGS,
    schema=f"(Tensor query, Tensor key, Tensor value, {SCHEMA}, bool recompute=False) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    arguments, recompute = parse(rest)
    # Autocast off, or a kernel's own float32 products would be cast. A pass calls the operator
    # without `moba_attention`, and a kernel must never read out of bounds: hence the checks.
    with torch.autocast(query.device.type, enabled=False):
        check(query, key, value, arguments)
        out, lse, *more = kernel_for(query.device).forward(query, key, value, arguments)
        return out, lse, routes_to_keep(more, query, key, arguments, recompute)


@torch.library.custom_op(
    "moonfx::moba_attention_backward",
    mutates_args=(),
    tags=TAGS,
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, Tensor routes, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    routes: Tensor,
    *rest: Any,
) -> tuple[Any, ...]:
    arguments, _ = parse(rest)
    given = kept_routes(routes, key, arguments)
    with torch.autocast(query.device.type, enabled=False):
        check(query, key, value, arguments)
        *grads, grad_bias = kernel_for(query.device).backward(
            grad_out, grad_lse, query, key, value, out, lse, arguments, **given
        )
    if grad_bias is None:  # an operator's result is a tensor
        grad_bias = query.new_empty(0, dtype=torch.float32)
    return *grads, grad_bias


@_forward.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    arguments, recompute = parse(rest)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    shape = routes_shape(query, key, arguments, recompute)
    return empty_by_token(query, value.shape[3]), lse, query.new_empty(shape, dtype=torch.int32)


@_backward.register_fake
def _(grad_out, grad_lse, query, key, value, out, lse, routes, *rest):  # type: ignore[no-untyped-def]
    arguments, _ = parse(rest)
    bias = (query.shape[0], query.shape[1], key.shape[2])
    size = (0,) if arguments.key_bias is None else bias
    grads = (empty_by_token(tensor, tensor.shape[3]) for tensor in (query, key, value))
    return *grads, query.new_empty(size, dtype=torch.float32)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, *rest = inputs
    arguments, _ = parse(rest)
    ctx.numbers, tensors = arguments.split()
    ctx.names = tuple(tensors)
    ctx.save_for_backward(query, key, value, *output, *tensors.values())
    ctx.set_materialize_grads(False)  # lse is seldom used: no zeros for its gradient
    ctx.mark_non_differentiable(output[2])


def _autograd(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Any, ...]:
    query, key, value, out, lse, routes, *tensors = ctx.saved_tensors
    arguments = MobaArguments(**ctx.numbers, **dict(zip(ctx.names, tensors, strict=True)))
    # Last inputs that were left at their defaults are not in needs_input_grad.
    needed = ctx.needs_input_grad
    if grad_out is None and grad_lse is None:
        return (None,) * len(needed)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = torch.ops.moonfx.moba_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, routes, *arguments
    )
    found = dict(zip(TENSORS, grads, strict=True))
    if arguments.key_bias is not None:
        found["key_bias"] = grad_bias.sum_to_size(arguments.key_bias.shape)
    return tuple(found.get(name) if need else None for name, need in zip(INPUTS, needed))


_forward.register_autograd(_autograd, setup_context=_setup_context)

# torch.library.register_autocast casts to one fixed dtype; attention follows autocast's own.
_library = torch.library.Library("moonfx", "FRAGMENT")


def _autocast(device_type: str) -> Any:
    def cast(query, key, value, *rest, **named):  # type: ignore[no-untyped-def]
        dtype = torch.get_autocast_dtype(device_type)
        inputs = [x.to(dtype) if x.dtype in checks.DTYPES else x for x in (query, key, value)]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.moonfx.moba_attention(*inputs, *rest, **named)

    return cast


_library.impl("moba_attention", _autocast("cpu"), "AutocastCPU")
_library.impl("moba_attention", _autocast("cuda"), "AutocastCUDA")
