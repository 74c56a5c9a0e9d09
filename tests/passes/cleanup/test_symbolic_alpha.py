"""A sum's alpha that is a symbol becomes a product; any other sum stays as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moonfx.passes.cleanup import symbolic_alpha
from moonfx.passes.context import Context
from moonfx.policy import LayerPolicy

aten = torch.ops.aten
P, U = torch.full((2, 3), 1.5), torch.linspace(-1, 1, 6).view(2, 3)
Dtype = torch.dtype


def learning_rate() -> torch.SymFloat:
    env = ShapeEnv(specialize_zero_one=False)
    symbol = env.create_unspecified_symbol(0.1, ConstantSource("lr"))
    made: torch.SymFloat = env.create_symfloatnode(symbol, hint=0.1)
    return made


def graph_of(target: Any, to: Dtype, given: Dtype, alpha: Any = None) -> fx.GraphModule:
    """target(p, u, alpha=lr), with p and u of these dtypes."""
    graph = fx.Graph()
    p, u, lr = (graph.placeholder(name) for name in ("p", "u", "lr"))
    p.meta["val"], u.meta["val"] = P.to(to), U.to(given)
    lr.meta["val"] = learning_rate() if alpha is None else alpha
    node = graph.call_function(target, (p, u), {"alpha": lr})
    node.meta["val"] = torch.empty(2, 3, dtype=torch.promote_types(to, given))
    graph.output(node)
    return fx.GraphModule(torch.nn.Module(), graph)


def run(gm: fx.GraphModule) -> int:
    count = symbolic_alpha.run(gm.graph, Context(gm, lambda *given: LayerPolicy()))
    gm.graph.lint()
    gm.recompile()
    return count


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("to", "given"), [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)])
@pytest.mark.parametrize(
    "target", [aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor]
)
def test_the_product_is_what_the_sum_was_to_a_rounding(
    target: Any, to: Dtype, given: Dtype
) -> None:
    gm = graph_of(target, to, given)
    expected = target(P.to(to), U.to(given), alpha=0.1)
    assert run(gm) == 1
    assert not any(n.kwargs for n in gm.graph.nodes)
    torch.testing.assert_close(gm(P.to(to), U.to(given), 0.1), expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize(
    ("to", "given"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, F64), (F32, torch.int64)]
)
def test_a_sum_whose_product_would_lose_precision_stays(to: Dtype, given: Dtype) -> None:
    gm = graph_of(aten.add.Tensor, to, given)
    before = str(gm.graph)
    assert run(gm) == 0
    assert str(gm.graph) == before


def test_an_alpha_that_is_known_or_an_integer_stays() -> None:
    for known in (0.1, 2):
        assert run(graph_of(aten.add_.Tensor, F32, F32, known)) == 0
    gm = graph_of(aten.add_.Tensor, F32, F32)
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    node.kwargs = {"alpha": 0.5}
    assert run(gm) == 0
    node.kwargs = {}
    assert run(gm) == 0


def test_a_sum_with_a_number_stays() -> None:
    gm = graph_of(aten.add.Tensor, F32, F32)
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    node.update_arg(1, 2.0)
    assert run(gm) == 0


def test_what_it_multiplies_is_used_and_not_changed() -> None:
    gm = graph_of(aten.add_.Tensor, F32, F32)
    run(gm)
    p, u = P.clone(), U.clone()
    gm(p, u, 0.1)
    assert isinstance(p, Tensor)
    torch.testing.assert_close(p, P + 0.1 * U)
    assert torch.equal(u, U)
