"""Problems of the GPU backward, and their gradients beside autograd's through the reference."""

from typing import Any

import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import backward as gpu_backward
from moonfx.kernels.gpu import block_index as gpu_index
from moonfx.kernels.gpu.problem import Layout, layout
from moonfx.kernels.reference import moba as reference
from tests.kernels.torch_ops.test_moba import TOLERANCE
from tests.support.moba_cases import Case

NAMES = ("dq", "dk", "dv", "dbias")


def routes_of(query: Tensor, key: Tensor, of: Layout, arguments: MobaArguments) -> Tensor:
    """int32 [B, Hkv, R, K] by the definition, from the layout's slots."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk = key.shape[1:3]
    bias = torch.zeros(1) if arguments.key_bias is None else arguments.key_bias.nan_to_num()
    bias = bias.expand(B, Hq, Nk).unflatten(1, (Hkv, of.group))
    place = torch.arange(Nk).expand(B, Nk) if of.blocks.token is None else of.blocks.token.long()
    keys = key.float().nan_to_num().gather(2, place[:, None, :, None].expand(B, Hkv, Nk, D))
    bias = bias.gather(3, place[:, None, None].expand(B, Hkv, of.group, Nk))
    slot = torch.arange(Nk)
    start, size = of.blocks.start[..., None], of.blocks.size[..., None]
    inside = ((slot >= start) & (slot < start + size)).float()  # [B, n, Nk]
    share = inside / size.clamp(min=1)
    means, biases = share[:, None] @ keys, share[:, None] @ bias.mT  # [B, Hkv, n, D or G]
    index = torch.arange(Nq).expand(B, Nq) if of.queries.index is None else of.queries.index.long()
    rows = query.float().gather(2, index[:, None, :, None].expand(query.shape))
    rows = rows.unflatten(1, (Hkv, of.group)).transpose(2, 3)  # [B, Hkv, Nq, G, D]
    score = torch.einsum("bhqgd,bhnd->bhqgn", rows, means)
    score = score + biases.mT[:, :, None] / (arguments.scale or 1.0)
    number = torch.arange(of.n)
    own, first, end = (
        x[:, None, :, None, None] for x in (of.queries.own, of.queries.first, of.queries.end)
    )
    end = end.where(own >= 0, -1)
    able = (number >= first) & (number < end) & (number != own)
    score = score.masked_fill(able & (number < first + of.sinks), torch.inf)
    best = score.masked_fill(~able, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = best.masked_fill(~able.expand(score.shape).gather(-1, best), -1)
    best = torch.nn.functional.pad(best, (0, of.topk), value=-1)[..., : of.topk - 1]
    routes = torch.cat([own.expand(*best.shape[:-1], 1), best], -1)
    return routes.flatten(2, 3).int()


def index_of(routes: Tensor, n: int) -> gpu_index.Index:
    """What block_index.build gives, by torch: in one chunk."""
    heads = routes.shape[0] * routes.shape[1]
    blocks = routes.view(heads, -1).long()
    blocks = (blocks + torch.arange(heads)[:, None] * n).where(blocks >= 0, heads * n).flatten()
    entries = blocks.sort(stable=True).indices % routes[0, 0].numel()
    starts = torch.searchsorted(blocks.sort().values, torch.arange(heads * n + 1))
    return gpu_index.Index(routes.contiguous(), entries.int(), starts, n, 1, routes.shape[2])


def problem(case: Case) -> tuple[Any, ...]:
    """What the kernel is given after the gradients."""
    inputs, arguments = case.inputs(), case.arguments()
    with torch.no_grad():
        out, lse = reference.moba_attention(*inputs, arguments)
    of = layout(inputs[0], inputs[1], arguments)
    index = None
    if of.n > 1:
        index = index_of(routes_of(*inputs[:2], of, arguments), of.n)
    return *inputs, out, lse, of, index, arguments


def upstream(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients on the grid: exact in every dtype."""
    return (torch.randint(-8, 9, out.shape) / 8).to(out), (torch.randint(-8, 9, lse.shape) / 8).to(
        lse
    )


def assert_like_reference(case: Case) -> None:
    given = problem(case)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    bias = case.full_bias()
    arguments = case.arguments()._replace(key_bias=bias)
    out, lse = reference.moba_attention(*leaves, arguments)
    grads = upstream(out, lse)
    leaves += [] if bias is None else [bias]
    expected = torch.autograd.grad((out, lse), leaves, grads)
    got = [grad for grad in gpu_backward.gradients(*grads, *given) if grad is not None]
    for name, mine, theirs in zip(NAMES[: len(expected)], got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        torch.testing.assert_close(
            mine, theirs, **TOLERANCE[case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


def random(case: Case, *, chunks: bool = False) -> tuple[Any, ...]:
    """A problem off the grid, where another order of summation would show."""
    torch.manual_seed(1)
    query, key, value, _, _, of, index, arguments = problem(case)
    if chunks:
        index = gpu_index.build(index.routes, of.n)
    query, key, value = (torch.randn_like(x) for x in (query, key, value))
    # Any out and lse will do: rows of P need not sum to 1.
    out = torch.randn(*query.shape[:3], value.shape[3])
    lse = torch.rand(query.shape[:3]) + 2
    return (
        torch.randn_like(out),
        torch.randn_like(lse),
        query,
        key,
        value,
        out,
        lse,
        of,
        index,
        arguments,
    )
