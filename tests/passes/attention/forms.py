"""Attention written by hand: what the tests of the passes compile, and what became of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.passes.context import Context
from moonfx.passes.pass_manager import run_passes
from moonfx.policy import LayerPolicy
from moonfx.report.report import Report

B, H, N, D = 2, 4, 24, 8
SCALE = D**-0.5
NEG = torch.finfo(torch.float32).min


class Model(nn.Module):
    """Runs `body(self, *inputs)`; keyword arguments become buffers."""

    def __init__(self, body: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def inputs(
    b: int = B, h: int = H, n: int = N, d: int = D, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [b, h, n, d], the same on every call."""
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(b, h, n, d, generator=generator).to(dtype)  # noqa: E731
    return make(), make(), make()


def causal(n: int = N, k: int | None = None) -> Tensor:
    """bool [n, k], True where query i may see key j; the last query sees the last key."""
    k = n if k is None else k
    return torch.arange(k)[None, :] <= torch.arange(n)[:, None] + (k - n)


def run(model: nn.Module, *given: Any, block: int = N, topk: int = 1) -> tuple[Any, Report]:
    """The output of the model made sparse, and the report; sinks 0, eager."""
    moonfx.sparsify(model, block, topk, sinks=0, compiler="eager", on_miss="ignore")
    try:
        out = model(*given)
        report = moonfx.report(model)
    finally:
        moonfx.restore(model)
        torch.compiler.reset()
    assert report.failures == []
    return out, report


def outcome(report: Report) -> list[str]:
    """Each site's mask class if it became sparse, or why it did not, without the node."""
    return [r.mask if r.action == "sparse" else r.reason.split(" (node")[0] for r in report.rows]


def check_form(
    body: Callable[..., Any],
    expected: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    form: str,
    modifiers: str = "",
    heads: tuple[int, int] = (H, H),
    kv_heads: int = H,
    **buffers: Tensor,
) -> None:
    """Causal attention of `body`: dense at full topk, forward and backward, else `expected`.

    Args:
        expected: the reference of block 4, topk 2 for a query, key and value.
        heads: the heads that the report must show.
        kv_heads: how many heads key and value are made with.
    """
    q, k, v = inputs()
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    results = []
    for compile in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        model = Model(body, **buffers)
        out, report = run(model, *leaves) if compile else (model(*leaves), None)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
        if report is not None:
            rows = [
                (r.form, r.mask, r.action, r.modifiers, (r.heads, r.kv_heads), r.reason)
                for r in report.rows
            ]
            assert rows == [(form, "causal", "sparse", modifiers, heads, "")]
    for got, wanted in zip(results[1], results[0], strict=True):
        # The same sums in another order, in float32.
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    sparse, _ = run(Model(body, **buffers), q, k, v, block=4, topk=2)
    torch.testing.assert_close(sparse, expected(q, k, v), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(sparse, results[0][0], atol=1e-3)


SINK = torch.tensor([0.3, -1.0, 2.0, 0.0]).view(H, 1, 1)


def sunk(q: Tensor, k: Tensor, v: Tensor, cap: float = 0.0) -> Tensor:
    """The reference of block 4, topk 2 with sink logits SINK."""
    out, lse = moba_attention(q, k, v, MobaArguments(4, 2, softcap=cap))
    return out * torch.sigmoid(lse - SINK[None, :, 0])[..., None]


def hidden(s: Tensor) -> Tensor:
    """Scores without those of later keys."""
    return s.masked_fill(~causal(), -torch.inf)


def captured(
    body: Callable[..., Any], given: tuple[Tensor, ...] | None = None, mode: str = "fake"
) -> fx.GraphModule:
    """A function of query, key and value in pre-dispatch ATen."""
    given = inputs() if given is None else given
    return make_fx(body, pre_dispatch=True, tracing_mode=mode)(*given)


def result(gm: fx.GraphModule) -> fx.Node:
    """The one node that a graph returns."""
    (node,) = gm.graph.output_node().all_input_nodes
    return node


def rewritten(
    body: Callable[..., Any],
    given: tuple[Tensor, ...] | None = None,
    policy: Callable[..., Any] = lambda *site: LayerPolicy(4, 2, 0),
    **settings: Any,
) -> fx.GraphModule:
    """The captured graph of a function, after the passes."""
    gm = captured(body, given)
    run_passes(Context(gm, policy, **settings), check=True)
    return gm
