"""Who takes part in `moonfx bench attention`: each makes one call, or says why it cannot.

dense      F.scaled_dot_product_attention
moonfx     moba_attention
flex       FlexAttention, compiled: moonfx/bench/attention/flex.py
reference  kernels/reference/moba.py, the definition: every score in memory, twice over
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from moonfx.bench.attention.cases import Case
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.harness.machine import Absent
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from moonfx.ops.moba import moba_attention

# Beside "auto", torch's own choice.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BASELINES = ("expanded", "enable_gqa")
Attention = Callable[..., Tensor]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None
    means: Tensor | None


def inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        shape = case.batch, heads, length, case.dim
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    query = random(case.heads, case.queries)
    key, value = (random(case.kv_heads, case.length) for _ in range(2))
    gradient = random(case.heads, case.queries) if case.backward else None
    return Inputs(query, key, value, gradient, block_means(key, case) if case.means else None)


def block_means(key: Tensor, case: Case) -> Tensor:
    """Of the complete blocks, float32: what a cache keeps."""
    complete = case.length // case.block
    blocks = key[:, :, : complete * case.block].unflatten(2, (complete, case.block))
    return blocks.mean(3, dtype=torch.float32)


def moonfx(case: Case, given: Inputs) -> Callable[[], object]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return moba_attention(
            *(query, key, value, case.block, case.topk),
            sinks=case.sinks,
            block_means=given.means,
        )

    return run(attention, [given.query, given.key, given.value], given.gradient)


def dense(case: Case, given: Inputs, baseline: str, backend: str = "auto") -> Callable[[], object]:
    """With key and value heads expanded beforehand, or with enable_gqa=True; by one of BACKENDS."""
    mask = None
    if 1 < case.queries < case.length:
        mask = causal_lower_right(case.queries, case.length)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=case.queries == case.length,
                enable_gqa=baseline == "enable_gqa",
            )

    group = case.heads // case.kv_heads if baseline == "expanded" else 1
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in given[1:3])
    return run(attention, [given.query, key, value], given.gradient)


def by_definition(case: Case, given: Inputs, up_to: int) -> Callable[[], object]:
    if case.length > up_to:
        raise Absent(f"holds N x N scores: N = {case.length} is over --reference-up-to {up_to}")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.moba_attention(
            query, key, value, MobaArguments(case.block, case.topk, sinks=case.sinks)
        )[0]

    return run(attention, [given.query, given.key, given.value], given.gradient)


def run(
    attention: Attention, tensors: list[Tensor], gradient: Tensor | None
) -> Callable[[], object]:
    if gradient is None:

        def forward() -> object:
            with torch.no_grad():
                return attention(*tensors)

        return forward

    leaves = [x.detach().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, gradient)
