"""What follows an attention sees the strides that it saw before, or does not see strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import compile_call
from moonfx.passes.attention import output_strides as layout
from moonfx.passes.cleanup import verify
from moonfx.passes.context import Context
from moonfx.policy import LayerPolicy, Policies
from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs, outcome, run

After = Callable[[Tensor], Any]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) * SCALE
    return s.masked_fill(~causal(), NEG).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def projected(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(B, N, H * D) @ torch.ones(H * D, D)


def written_through_a_view(y: Tensor) -> Tensor:
    y.view(B * H, N, D)[1].mul_(2.0)
    return y


def written_through_a_reshape(y: Tensor) -> tuple[Tensor, Tensor]:
    z = y.transpose(1, 2).reshape(B, N, H * D)  # a copy in dense attention
    z.mul_(2.0)
    return y, z


# name, what follows, copies of the output
FOLLOWERS: list[tuple[str, After, int]] = [
    ("projected", projected, 0),
    ("summed", lambda y: y.sum(-1), 0),
    ("contiguous", lambda y: y.contiguous().view(B * H, N, D), 0),
    ("flattened", lambda y: y.transpose(1, 2).flatten(2), 0),
    ("view", lambda y: y.view(B * H, N, D), 0),
    ("view after arithmetic", lambda y: (y * 2.0 + 1.0).view(B * H, N, D), 0),
    ("views", lambda y: y.view(B * H, N, D).view(B, H * N, D), 0),
    ("view of a slice", lambda y: y[:1].view(H, N, D), 1),
    ("returned", lambda y: y, 1),
    ("returned transposed", lambda y: y.transpose(1, 2), 1),
    ("returned beside another", lambda y: (projected(y), y * 2.0), 1),
    ("as_strided", lambda y: torch.as_strided(y, (H, N, D), y.stride()[1:]) + 1.0, 1),
    ("written through a view", written_through_a_view, 1),
    ("written through a reshape", written_through_a_reshape, 1),
    ("view as complex", lambda y: torch.view_as_complex(y.view(B, H, N, D // 2, 2)).abs(), 1),
]


def strides(values: Any) -> list[tuple[int, ...]]:
    return [x.stride() for x in (values if isinstance(values, tuple) else (values,))]


@pytest.mark.parametrize("attend", [by_hand, sdpa], ids=["by hand", "sdpa"])
@pytest.mark.parametrize("after", [r[1] for r in FOLLOWERS], ids=[r[0] for r in FOLLOWERS])
def test_strides_and_values_are_those_of_dense_attention(
    after: After, attend: Callable[..., Tensor]
) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return after(attend(q, k, v))

    try:
        dense = body(Model(body), *inputs())
    except RuntimeError:
        pytest.skip("dense attention itself has no such view")
    out, report = run(Model(body), *inputs())
    assert outcome(report) == ["causal"]
    torch.testing.assert_close(out, dense, atol=4e-6, rtol=1e-5)
    assert strides(out) == strides(dense)


def rewritten(after: After, *given: Tensor) -> fx.Graph:
    backend = Backend(Policies(LayerPolicy(8, 1, 0)), "eager")
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, given: list[Tensor]) -> object:
        graphs.append(backend.rewrite(gm, given)[0].graph)
        return gm.forward

    compile_call(lambda *x: after(by_hand(*x)), keep)(*given)
    (graph,) = graphs
    return graph


@pytest.mark.parametrize(
    ("after", "copies"), [r[1:] for r in FOLLOWERS], ids=[r[0] for r in FOLLOWERS]
)
def test_the_output_is_copied_only_where_its_strides_are_seen(after: After, copies: int) -> None:
    torch.compiler.reset()
    graph = rewritten(after, *inputs())
    operator = torch.ops.moonfx.moba_attention.default
    (attention,) = (n for n in graph.nodes if n.target is operator)
    (output,) = attention.users
    copied = [n for n in output.users if n.target is torch.ops.aten.contiguous.default]
    assert len(copied) == copies


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (3, 0, 1, 2), (2, 3, 1, 0)])
def test_a_copy_has_the_old_strides_in_whatever_order_they_were(order: tuple[int, ...]) -> None:
    back = [order.index(d) for d in range(4)]
    before = torch.randn([(B, H, N, D)[d] for d in order]).permute(back)
    graph = fx.Graph()
    new = graph.placeholder("new")
    new.meta["val"] = torch.randn(B, N, H, D).transpose(1, 2)
    assert layout.copied(before, new).meta["val"].stride() == before.stride()


def test_verify_refuses_fake_values_that_are_out_of_date() -> None:
    torch.compiler.reset()
    graph = rewritten(projected, *inputs())
    gm = fx.GraphModule(torch.nn.Module(), graph)
    context = Context(gm, lambda *given: LayerPolicy())
    verify.run(gm.graph, context)
    transpose = [n for n in gm.graph.nodes if n.target is torch.ops.aten.transpose.int][-1]
    value = transpose.meta["val"]
    transpose.meta["val"] = value.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(verify.InvalidGraph, match="out of date"):
        verify.run(gm.graph, context)
