"""MoBA attention on a GPU, in Triton (arXiv 2502.13189, eq. 2-6).

    problem       slots, blocks, rows      padding and segments become a sorted order
    block_means   mean(K block j)          eq. 6, float32
    route         which blocks each row attends: own, sinks, best of q . mean   eq. 5, 6
    block_index   routes sorted by block   eq. 4
    forward       flash attention of a block's rows;  merge: one softmax of a row's routes
    backward      gradients along the same routes
    decode        a few rows: no index, the keys of each block are split instead

Nothing waits for the host, nothing is atomic, and every result repeats bit for bit. Where all keys
fit in `topk` blocks there is one block per sequence and a route per row: flash attention.
"""

import torch
import triton
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.common.token_layout import empty_by_token
from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu import block_index, block_means, configs
from moonfx.kernels.gpu import decode as gpu_decode
from moonfx.kernels.gpu import forward as gpu_forward
from moonfx.kernels.gpu import problem as gpu_problem
from moonfx.kernels.gpu import route as gpu_route
from moonfx.kernels.gpu.block_index import Index
from moonfx.kernels.gpu.problem import Layout


def available() -> str | None:
    """Why these kernels cannot run on this machine's GPU, and what to do; None where they can."""
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU: install torch for the machine's GPU, or use the CPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {torch.cuda.get_device_capability()}; 8.0 is needed"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the selected blocks.

    Args:
        query: [B, Hq, Nq, D] float32, bfloat16 or float16, any strides.
        key, value: [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv], query's dtype; Hkv divides Hq, Nq <= Nk.
            D and Dv are at most 512: a tile is as wide as a head.
        The rest as in kernels/reference/moba.py, whose results these are to rounding.
    Returns:
        out [B, Hq, Nq, Dv] in query's dtype over token-major storage, lse [B, Hq, Nq] float32, the
        natural logarithm, and the routes that `backward` may take. A query that sees no real key
        gives 0 and -inf.
    """
    if max(query.shape[3], value.shape[3]) > configs.DIMS[-1]:
        raise ValueError(
            f"head_dim must be at most {configs.DIMS[-1]} on a GPU, got {query.shape[3]} "
            f"(query, key) and {value.shape[3]} (value)"
        )
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        return _forward(query.detach(), key.detach(), value.detach(), arguments)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
) -> tuple[Tensor, Tensor, Tensor]:
    layout = gpu_problem.layout(query, key, arguments)
    if query.shape[:3].numel() == 0:
        out = empty_by_token(query, value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        shape = (*key.shape[:2], query.shape[2] * layout.group, layout.topk)
        return out, lse, query.new_empty(shape, dtype=torch.int32)
    routes = routes_of(query, key, layout, arguments)
    if gpu_decode.fits(query, layout):
        out, lse = gpu_decode.attend(query, key, value, layout, routes, arguments)
    else:
        index = index_of(routes, layout)
        out, lse = gpu_forward.attend(query, key, value, layout, index, arguments)
    return out, lse, routes


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: MobaArguments,
    *,
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad_out: like out. grad_lse: like lse, or None. The others as `forward` took and gave them.
        routes: as `forward` gave them; None to find them again.
    Returns:
        The gradients of query, key and value, in their dtypes and over token-major storage, and
        that of the key bias as if it were not broadcast, float32 [B, Hq, Nk]: None without one.
    """
    query, key, value = query.detach(), key.detach(), value.detach()
    if lse.numel() == 0:
        zeros = [empty_by_token(x, x.shape[3]).zero_() for x in (query, key, value)]
        size = query.shape[0], query.shape[1], key.shape[2]
        grad_bias = (
            None if arguments.key_bias is None else query.new_zeros(size, dtype=torch.float32)
        )
        return zeros[0], zeros[1], zeros[2], grad_bias
    with torch.cuda.device_of(query):
        layout = gpu_problem.layout(query, key, arguments)
        if routes is None:
            routes = routes_of(query, key, layout, arguments)
        index = index_of(routes, layout)
        return gpu_backward.gradients(
            grad_out, grad_lse, query, key, value, out, lse, layout, index, arguments
        )


def routes_of(query: Tensor, key: Tensor, layout: Layout, arguments: MobaArguments) -> Tensor:
    """The blocks that each row attends, int32 [B, Hkv, Nq * G, K]; eq. 5 and 6."""
    if layout.n == 1:  # rows that see nothing included: they see no slot of it
        shape = (*key.shape[:2], query.shape[2] * layout.group, 1)
        return query.new_zeros(shape, dtype=torch.int32)
    means = biases = None
    if gpu_route.gated(layout) > 0:
        means = arguments.block_means
        if means is None:
            means = block_means.block_means(key, layout)
        if arguments.key_bias is not None:
            biases = block_means.bias_means(arguments.key_bias.detach(), layout, query.shape[1])
    return gpu_route.route(query, means, biases, layout, arguments.scale_for(query.shape[3]))


def index_of(routes: Tensor, layout: Layout) -> Index | None:
    """The routes by block; None where every row has the one block that there is."""
    return None if layout.n == 1 else block_index.build(routes, layout.n)
