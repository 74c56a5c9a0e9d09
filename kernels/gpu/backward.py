"""Gradients of MoBA's attention on a GPU, from its index: seven products, nothing atomic.

    delta = rowsum(dO O) - dlse             once per row          backward_preprocess.py
    P = exp(S - lse),  dS = P (dO V^T - delta),  dR = scale (1 - tanh^2) dS
    dV = P^T dO,  dK = dR^T Q,  db = sum dS  a program per keys   backward_dkdv.py
    dQ = dR K                                a tile per rows      backward_dq.py

S and dO V^T are made twice, once for each order of the work: a sum then belongs to one program, or
to one launch that adds partial sums in a fixed order, and every gradient repeats bit for bit.

Kept from the forward are q, k, v, out, lse and the routes; scratch is what block_index.BUDGET and
backward_schedule.SPLIT allow, and tables of the index's size.
"""

from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu.backward_dkdv import gradients_of_keys
from moonfx.kernels.gpu.backward_dq import gradient_of_query
from moonfx.kernels.gpu.backward_preprocess import statistics
from moonfx.kernels.gpu.block_index import Index
from moonfx.kernels.gpu.problem import Layout
from moonfx.kernels.gpu.tile import inner_contiguous


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    index: Index | None,
    arguments: MobaArguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], not empty.

    Args:
        grad_out, out: [B, Hq, Nq, Dv]. grad_lse, lse: [B, Hq, Nq]; no grad_lse is zero.
        layout, index: as forward.attend took them.
    Returns:
        dq, dk and dv in their tensors' dtypes, stored by token, and db of the key bias as if it
        were float32 [B, Hq, Nk], None without one. 0 for padding and for rows that see nothing.
    """
    query, key, value, out = (inner_contiguous(x.detach()) for x in (query, key, value, out))
    grad_out = inner_contiguous(grad_out.detach().to(query.dtype))
    if grad_lse is not None:
        grad_lse = grad_lse.detach().float().contiguous()
    rows = statistics(grad_out, grad_lse, out, lse.contiguous(), layout)
    of = grad_out, query, key, value, rows, layout, index, arguments
    grad_key, grad_value, grad_bias = gradients_of_keys(*of)
    return gradient_of_query(*of), grad_key, grad_value, grad_bias
